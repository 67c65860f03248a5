"""The command line: `python -m qfuse explain package.module:factory` and `python -m qfuse doctor`."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """What the user can correct, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status. Errors of the user's own model keep their traceback."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except UsageError as error:
        print(f"qfuse: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qfuse", description="Fused quantized linears for torch.compile.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    explain = commands.add_parser(
        "explain",
        help="say what is fused in a model, what is not, and why",
        description="Say which quantized linears of a model are fused, which are not, why, and what to change.",
    )
    explain.add_argument(
        "factory",
        metavar="package.module:factory",
        help="a function without arguments that returns (model, args) or (model, args, kwargs)",
    )
    explain.add_argument("--html", metavar="PATH", type=Path, help="also write a page with the graphs before and after")
    explain.add_argument("--json", action="store_true", help="print JSON instead of tables")
    explain.set_defaults(command=_explain)
    doctor = commands.add_parser(
        "doctor",
        help="say what qfuse finds on this machine, to paste into a bug report",
        description="Print versions, what the CPU can do, what is switched on, what would be chosen, known problems.",
    )
    doctor.set_defaults(command=_doctor)
    return parser


def _explain(options: argparse.Namespace) -> None:
    import torch

    import qfuse

    page: Path | None = options.html
    if page is not None and (page.is_dir() or not os.access(page.parent, os.W_OK)):
        raise UsageError(f"cannot write {page}: {'it is a directory' if page.is_dir() else 'no such directory'}")
    factory = find_factory(options.factory)
    with torch.no_grad():
        model, args, kwargs = model_and_inputs(options.factory, factory())
        report = qfuse.explain(model, *args, **kwargs)
    print(report.to_json() if options.json else report)
    if page is not None:
        report.to_html(page)


def _doctor(options: argparse.Namespace) -> None:
    from qfuse.doctor import diagnosis

    print(diagnosis())


def find_factory(spec: str) -> Callable[[], Any]:
    """Import what `package.module:factory` names; also from the current directory.

    Raises:
        UsageError: there is no such function.
    """
    name, colon, path = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in [*name.split("."), *path.split(".")]):
        raise UsageError(f"{spec!r} is not of the form package.module:factory")
    if (here := os.getcwd()) not in sys.path:  # PYTHONSAFEPATH leaves it out
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # what the module itself imports is missing
        raise UsageError(f"there is no module {error.name!r} in {here} or on sys.path") from None
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise UsageError(f"{name!r} has no {path!r}") from None
    if not callable(found):
        raise UsageError(f"{spec} is no function, but of type {type(found).__name__}")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise UsageError(f"{spec} cannot be called without arguments: {error}") from None
    except ValueError:
        pass  # a builtin that has no signature
    return found


def model_and_inputs(spec: str, made: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Take apart what a factory has returned.

    Raises:
        UsageError: it is not (model, args) or (model, args, kwargs).
    """
    match made:
        case (model, list() | tuple() as args) if callable(model):
            return model, tuple(args), {}
        case (model, list() | tuple() as args, dict() as kwargs) if callable(model):
            return model, tuple(args), kwargs
    types = ", ".join(type(m).__name__ for m in made) if isinstance(made, tuple) else ""
    what = f"({types})" if types else type(made).__name__
    raise UsageError(f"{spec} has to return (model, args) or (model, args, kwargs), args a tuple; it returned {what}")


if __name__ == "__main__":
    sys.exit(main())

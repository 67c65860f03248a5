"""ONNX Runtime and OpenVINO, where they are installed."""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.profiling import CALLS, WARM_UP_CALLS, summed

if TYPE_CHECKING:
    from benchmarks.model_engines import Prepared
    from benchmarks.models import Example, Inputs


def _onnx(example: Example, threads: int, *, int8: bool) -> Prepared:
    """Export the model, quantize it if asked, and make a session."""
    import onnxruntime

    from benchmarks.model_engines import Prepared

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.onnx")
        names = [f"x{i}" for i in range(len(example.inputs))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(example.model, example.inputs, path, input_names=names, dynamo=False)
        start = time.perf_counter()
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantized = Path(directory, "int8.onnx")
            quantize_dynamic(path, quantized, weight_type=QuantType.QInt8, per_channel=True)
            path = quantized
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        seconds = time.perf_counter() - start
    feed = {name: tensor.numpy() for name, tensor in zip(names, example.inputs, strict=True)}
    call = partial(session.run, None, feed)
    return Prepared(call, torch.from_numpy(call()[0]), seconds, onnxruntime.__version__)


def _openvino(example: Example, threads: int, *, precision: str, int8: bool = False) -> Prepared:
    """Convert the model, quantize it with static scales if asked, and compile it."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # a benchmark reports to nobody
    import openvino

    from benchmarks.model_engines import Prepared

    model = openvino.convert_model(example.model, example_input=example.inputs)
    for port, tensor in zip(model.inputs, example.inputs, strict=True):  # static shapes, as the others have
        port.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
    model.validate_nodes_and_infer_types()
    note = openvino.__version__.partition("-")[0]
    start = time.perf_counter()
    if int8:
        import nncf

        dataset = nncf.Dataset([_arrays(inputs) for inputs in example.calibration])
        model = nncf.quantize(
            model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(example.calibration)
        )
        note += f", NNCF {nncf.__version__}"
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = precision
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    seconds = time.perf_counter() - start
    feed = _arrays(example.inputs)
    call = partial(request.infer, feed, share_inputs=True, share_outputs=True)

    def kernels() -> list[list[Any]]:
        counting = openvino.Core().compile_model(model, "CPU", {**settings, "PERF_COUNT": True})
        return _time_by_layer(counting.create_infer_request(), feed)

    return Prepared(call, torch.from_numpy(call()[0].copy()).float(), seconds, note, kernels)


def _time_by_layer(request: Any, feed: list[Any]) -> list[list[Any]]:
    """Return what `profiling.kernels` does, by kind of layer: OpenVINO's name of the operator, and the primitive.

    What is fused into another layer takes no time, and is left out, as is what takes less than a microsecond.
    """
    for _ in range(WARM_UP_CALLS):
        request.infer(feed)
    before = request.get_profiling_info()
    for _ in range(CALLS):
        request.infer(feed)
    ran = []
    for layer, warm_up in zip(request.get_profiling_info(), before, strict=True):
        if layer.real_time:  # the mean of all calls so far
            time = (layer.real_time * (WARM_UP_CALLS + CALLS) - warm_up.real_time * WARM_UP_CALLS) / CALLS
            ran.append((f"{layer.node_type}, {layer.exec_type}", time.total_seconds() * 1e3))
    return summed(ran)


def _arrays(inputs: Inputs) -> list[Any]:
    return [tensor.numpy() for tensor in inputs]


onnx_fp32 = partial(_onnx, int8=False)
onnx_int8 = partial(_onnx, int8=True)
openvino_fp32 = partial(_openvino, precision="f32")
openvino_bf16 = partial(_openvino, precision="bf16")
openvino_int8 = partial(_openvino, precision="bf16", int8=True)  # what is not int8

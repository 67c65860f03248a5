"""Property tests of the matcher: legal epilogues fuse, near misses stay right. `scripts/fuzz` runs many more."""

from __future__ import annotations

import hypothesis.strategies as st
from epilogues import Recipe, check, legal, near_miss
from hypothesis import HealthCheck, given, settings

SHORT = settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@SHORT
@given(st.lists(legal(), min_size=25, max_size=25, unique=True))
def test_every_legal_epilogue_fuses(recipes: list[Recipe]) -> None:
    check(recipes, all_fuse=True)


@SHORT
@given(st.lists(near_miss(), min_size=25, max_size=25, unique=True))
def test_every_near_miss_stays_right(recipes: list[Recipe]) -> None:
    check(recipes, all_fuse=False)

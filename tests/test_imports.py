"""Large imports without garbage collection."""

import gc
from collections.abc import Iterator

import pytest

from selfkd.imports import without_collection


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    yield
    if not frozen:
        gc.unfreeze()
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_afterwards_what_it_was_even_where_an_import_fails(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    seen = []

    def fail() -> None:
        with without_collection():
            seen.append(gc.isenabled())
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert [*seen, gc.isenabled()] == [False, enabled]


@pytest.mark.parametrize("keep", [True, False])
def test_what_was_imported_is_left_out_of_later_collections_where_it_is_kept(keep: bool) -> None:
    gc.unfreeze()
    with without_collection(keep=keep):
        made: list[list[int]] = [[]]
    assert any(each is made for each in gc.get_objects()) is not keep
    assert bool(gc.get_freeze_count()) is keep

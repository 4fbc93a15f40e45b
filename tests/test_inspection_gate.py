"""The static gate: a planted spill and lost tensor cores must fail it, the shipped kernels must pass it."""

import importlib
import json
import pkgutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import fastops.kernels
from fastops.inspection import InspectionError, snapshot
from fastops.inspection.api import inspect_cases
from fastops.inspection.gpus import find_target
from tests.test_inspection import product

H100 = find_target("sm_90")


def gate(case, before, tmp_path, target=H100):
    """What the gate says of `case` where the snapshot holds the figures of `before` under the same name."""
    place = tmp_path / "snapshot.json"
    snapshot.write(place, inspect_cases([before], [target]), keep=False)
    now = inspect_cases([replace(case, name=before.name)], [target])
    return snapshot.compare(snapshot.read(place), now, whole_library=True)


def test_an_unchanged_kernel_passes(tmp_path):
    assert gate(product(), product(), tmp_path) == []


def test_a_planted_spill_fails(tmp_path):
    # an accumulator of 64 x 128 in one warp takes 256 registers of a thread, more than there are
    changes = gate(product(BM=64, BN=128, BK=16, num_warps=1), product(), tmp_path)
    worse = {change.what: change for change in changes if change.worse}
    assert worse["spilled bytes"].before == 0
    assert worse["spilled bytes"].after > 0
    assert worse["spill instructions"].after > 0
    assert "spilled bytes 0 -> " in str(worse["spilled bytes"])


@pytest.mark.parametrize(
    ("lost", "kind"),
    [
        (product(dtype="fp32", PREC="ieee", BK=16), None),  # IEEE fp32 products run on no tensor core
        (product(BM=32), "HMMA"),  # wgmma needs 64 rows
    ],
    ids=["fp32-ieee", "32-rows"],
)
def test_lost_tensor_cores_fail(lost, kind, tmp_path):
    changes = gate(lost, product(), tmp_path)
    (change,) = [change for change in changes if change.what == "lost"]
    assert change.worse
    assert (change.before, change.after) == ("HGMMA", kind)
    assert "lost HGMMA -> " in str(change)


def test_a_longer_loop_and_more_registers_fail(tmp_path):
    changes = gate(product(BK=128, PREC="ieee"), product(BK=64), tmp_path)
    before = {c.what: c for c in gate(product(), product(num_warps=4), tmp_path)}
    assert "registers" in before
    assert not before["registers"].worse  # 8 warps hold half as much each: better
    after = {c.what: c for c in gate(product(num_warps=4), product(), tmp_path)}
    assert after["registers"].worse
    assert all(change.kernel == product().name and change.target == "sm_90" for change in changes)


def test_a_kernel_that_stops_compiling_or_fitting_fails(tmp_path):
    (change,) = gate(product(BK=48), product(), tmp_path)
    assert change.worse
    assert change.what == "compiles"
    assert "power of 2" in change.after
    fits_no_more = gate(product(BN=256, BK=64, num_stages=4), product(), tmp_path, find_target("RTX 3090"))
    assert any("does not fit any more" in change.what and change.after == 0 for change in fits_no_more)


def test_new_and_vanished_kernels_are_named(tmp_path):
    place = tmp_path / "snapshot.json"
    snapshot.write(place, inspect_cases([product()], [H100]), keep=False)
    other = replace(product(), name="test.other")
    changes = snapshot.compare(snapshot.read(place), inspect_cases([other], [H100]), whole_library=True)
    assert {(change.kernel, change.before) for change in changes} == {
        ("test.other", "no budget"),
        (product().name, "a budget"),
    }
    assert all(change.worse for change in changes)
    partly = snapshot.compare(snapshot.read(place), inspect_cases([other], [H100]), whole_library=False)
    assert [change.kernel for change in partly] == ["test.other"]


def test_update_keeps_what_was_not_compiled(tmp_path):
    place = tmp_path / "deep" / "snapshot.json"
    snapshot.write(place, inspect_cases([product()], [H100]), keep=False)
    snapshot.write(place, inspect_cases([product()], [find_target("sm_80")]), keep=True)
    assert set(snapshot.read(place)[product().name]) == {"sm_80", "sm_90"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernels": []}', '{"kernels": {"a": 1}}', "\x00"])
def test_a_broken_snapshot_is_named(text, tmp_path):
    place = tmp_path / "snapshot.json"
    place.write_text(text)
    with pytest.raises(InspectionError, match="cannot be read"):
        snapshot.read(place)


def test_a_missing_snapshot_says_how_to_write_it(tmp_path):
    with pytest.raises(InspectionError, match="fastops inspect --update"):
        snapshot.read(tmp_path)


SHIPPED = Path(__file__).parent / "static"


def shipped(capability, of_each_kernel=None):
    """Configurations launched on the capability; with `of_each_kernel`, evenly spread so many of each kernel."""
    from fastops.inspection.catalog import library_cases

    by_kernel = {}
    for case in library_cases():
        if capability in case.targets:
            by_kernel.setdefault(case.name.partition("[")[0], []).append(case)
    if of_each_kernel is not None:
        by_kernel = {name: cases[:: -(-len(cases) // of_each_kernel)] for name, cases in by_kernel.items()}
    cases = [case for cases in by_kernel.values() for case in cases]
    return inspect_cases(cases, [find_target(f"sm_{capability}")])


def test_every_kernel_has_a_budget():
    """Every jit function named *_kernel in fastops.kernels is compiled in some configuration."""
    from fastops.inspection._source import function_of, is_kernel
    from fastops.inspection.catalog import library_cases

    written = set()
    for found in pkgutil.iter_modules(fastops.kernels.__path__):
        module = importlib.import_module(f"fastops.kernels.{found.name}")
        written |= {function_of(value) for value in vars(module).values() if is_kernel(value)}
    written = {f"{function.__module__}.{function.__name__}" for function in written}
    listed = {function_of(case.kernel) for case in library_cases()}
    listed = {f"{function.__module__}.{function.__name__}" for function in listed}
    assert len(listed) > 20
    assert {name for name in written if name.startswith("fastops.") and name.endswith("_kernel")} == listed


def assert_within_budget(assessments):
    place = snapshot.path_for(SHIPPED)
    if not place.exists():
        known = sorted(file.name for file in SHIPPED.glob("triton-*.json"))
        pytest.skip(f"no budgets for this Triton version ({place.name}); there are {', '.join(known)}")
    worse = [change for change in snapshot.compare(snapshot.read(SHIPPED), assessments, False) if change.worse]
    assert not worse, "\n".join(map(str, worse)) + "\nWhere that is meant: fastops inspect --update tests/static"


def test_a_sample_of_the_shipped_kernels_keeps_its_budgets():
    assert_within_budget(shipped(90, of_each_kernel=2))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90, 100])
def test_shipped_kernels_keep_their_budgets(capability):
    assert_within_budget(shipped(capability))


def test_snapshots_are_of_the_version_they_name():
    files = sorted(SHIPPED.glob("triton-*.json"))
    assert files
    for file in files:
        assert f"triton-{json.loads(file.read_text())['triton']}.json" == file.name

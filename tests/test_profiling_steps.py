"""Where steps end by themselves, and recording in spite of what scripts do: threads, profilers, odd names."""

import json
import threading

import pytest
import torch
from torch import nn

import fastops
from fastops.profiling.ranges import MOST_ROOTS


def calls(p):
    return {row.path: row.calls for row in p.modules()}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_accumulated_gradients_are_one_step():
    model = nn.Linear(4, 4)
    optimizer = sgd(model)
    with fastops.profile(model, warmup=1, steps=2) as p:
        for i in range(32):
            model(torch.randn(2, 4)).sum().backward()
            if i % 8 == 7:
                optimizer.step()
    assert p.summary.step.steps == 2
    assert calls(p)["Linear"] == 8


def test_a_gan_steps_when_both_optimizers_have():
    generator, discriminator = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 1)
    both = sgd(generator), sgd(discriminator)
    with fastops.profile(warmup=2, steps=3) as p:
        for _ in range(8):
            discriminator(generator(torch.randn(2, 4)).detach()).sum().backward()
            both[1].step()
            discriminator(generator(torch.randn(2, 4))).sum().backward()
            both[0].step()
    assert p.summary.step.steps == 3
    assert calls(p)["Sequential"] == 2
    assert calls(p)["Linear"] == 2


def test_inference_with_two_models_steps_with_the_first():
    encoder, decoder = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))
    with fastops.profile(warmup=1, steps=3) as p, torch.no_grad():
        for _ in range(6):
            x = encoder(torch.randn(1, 4))
            for _ in range(5):
                x = nn.ReLU()(decoder(x))
    assert p.summary.step.steps == 3
    assert calls(p)["Sequential"] == 5


def test_validation_is_no_step_of_a_training_script():
    model = nn.Linear(4, 4)
    optimizer = sgd(model)
    with fastops.profile(script=True, steps=2) as p:
        with torch.no_grad():
            for _ in range(9):
                model(torch.randn(1, 4))
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
    assert p.summary.step.steps == 2
    assert calls(p)["Linear"] == (9 + 2) / 2


def test_marks_by_hand_are_the_only_ones_from_there_on():
    model = nn.Linear(4, 4)
    with fastops.profile(model) as p, torch.no_grad():
        for _ in range(3):
            model(torch.randn(1, 4))
            model(torch.randn(1, 4))
            p.mark()
    assert p.summary.step.steps == 3
    assert p.recorder.seen == 2 + 3  # the forwards before the first mark, and the marks
    assert calls(p)["Linear"] == 2


def test_without_a_module_marks_by_hand_do():
    with fastops.profile() as p:
        for _ in range(3):
            torch.ones(8, 8) @ torch.ones(8, 8)
            p.mark()
    assert p.summary.step.steps == 3
    assert "aten::mm" in p.table()


def test_nothing_seen_says_so():
    with fastops.profile() as p:
        torch.ones(3)
    with pytest.raises(RuntimeError, match=r"no step was seen.*mark\(\)"):
        p.table()


def test_modules_in_threads():
    model = nn.Linear(64, 64)

    def work():
        for _ in range(6):
            model(torch.randn(2, 64)).sum().backward()

    with fastops.profile(model, warmup=2) as p:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    [row] = [row for row in p.modules() if row.path == "Linear"]
    assert p.summary.step.steps == 4
    assert row.backward_ms > 0

    with fastops.profile(model) as p:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert any("several threads" in note for note in p.summary.notes)


def test_modules_built_in_every_step_share_a_name():
    model = nn.Linear(4, 4)
    with fastops.profile(model) as p:
        for _ in range(2 * MOST_ROOTS):
            nn.CrossEntropyLoss()(nn.Sequential(model)(torch.randn(2, 4)), torch.tensor([0, 1])).backward()
    assert len(p.recorder.ranges.roots) <= MOST_ROOTS + 1
    assert calls(p)["CrossEntropyLoss"] == pytest.approx(1, abs=0.1)


ODD = ['a"b', "c\\d", "e\nf", "tab\t", "<script>alert(1)</script>", "[/red]", "ключ", "\x1b[31m", '", "pid": 1']


def test_odd_names_survive_the_trace_the_table_and_the_page(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({name: nn.Linear(4, 4) for name in ODD})

        def forward(self, x):
            with torch.profiler.record_function('the user says "hi"'):
                for part in self.parts.values():
                    x = part(x)
            return x

    model = Odd()
    with fastops.profile(model) as p:
        model(torch.randn(2, 4)).sum().backward()
    assert {f"Odd.parts.{name}" for name in ODD} <= calls(p).keys()
    table = p.table(top=99)
    assert "[/red]" in table
    assert "\x1b" not in table
    p.html(tmp_path / "p.html")
    assert "<script>alert" not in (tmp_path / "p.html").read_text()
    p.trace(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_two_profilers_do_not_meet():
    model = nn.Linear(4, 4)
    with fastops.profile(model) as p:
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
        with torch.profiler.profile() as other:
            model(torch.randn(2, 4)).sum().backward()
    assert p.summary.step.steps == 2
    assert len(other.events()) > 10
    with torch.profiler.profile(), fastops.profile(model) as p:
        model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="another torch profiler"):
        p.table()
    with fastops.profile(model) as p:  # and nothing is left behind
        model(torch.randn(2, 4)).sum().backward()
    assert p.summary.step.steps == 1


def test_a_profile_is_used_once_and_read_afterwards():
    model = nn.Linear(4, 4)
    with fastops.profile(model) as p:
        model(torch.randn(2, 4)).sum().backward()
        with pytest.raises(RuntimeError, match="after the with statement"):
            p.table()
    with pytest.raises(RuntimeError, match="make a new one"):
        p.__enter__()


def test_many_modules_in_a_row():
    model = nn.Sequential(*[nn.Identity() for _ in range(500)], nn.Linear(4, 4))
    with fastops.profile(model) as p, torch.no_grad():
        model(torch.randn(2, 4))
    assert len(calls(p)) >= 502


def test_an_accelerated_model_whose_parts_are_not_called():
    model = fastops.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)))
    with fastops.profile(model) as p:
        for _ in range(2):
            model(torch.randn(2, 3, 9, 9)).sum().backward()
    rows = {row.path: row for row in p.modules()}
    assert rows["Sequential"].forward_ms > 0
    assert rows["Sequential"].backward_ms > 0
    assert "Sequential" in p.table()
    assert p.advice() == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_of_a_checkpoint_reaches_the_modules_inside(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.parts, x, use_reentrant=reentrant)

    model = Checkpointed()
    with fastops.profile(model) as p:
        for _ in range(2):
            model(torch.randn(2, 8, requires_grad=True)).sum().backward()
    names = {row.name for row in p.kernels() if "Checkpointed.parts.0" in row.modules}
    assert "AddmmBackward0" in names

"""The optimisation loop against torch's own pieces, the schedule against its formulas; divergence, stops, memory."""

import math
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch

from sovit.train.loop import WINDOW, Diverged, Interrupted, OutOfMemory, Position, Task, fit, schedule

# schedule ------------------------------------------------------------------------------------------------------------


def test_warm_up_is_linear_and_ends_at_the_peak():
    values = [schedule(s, warmup=50, timescale=None, cooldown=None) for s in range(60)]
    assert values[0] == 1 / 50
    assert values[24] == 0.5
    assert values[49:] == [1.0] * 11
    assert schedule(0, warmup=0, timescale=None, cooldown=None) == 1.0


def test_rsqrt_trunk():
    """peak / sqrt(1 + (step - warmup) / timescale), arXiv 2106.04560: half the peak after three timescales."""
    kw = dict(warmup=10, timescale=100, cooldown=None)
    assert schedule(10, **kw) == 1.0
    assert schedule(10 + 300, **kw) == 0.5
    assert schedule(10 + 1500, **kw) == 0.25
    assert schedule(4, **kw) == 0.5
    assert all(schedule(s, **kw) > schedule(s + 1, **kw) for s in range(10, 100))


@pytest.mark.parametrize("timescale", [None, 40])
def test_cooldown_is_one_minus_sqrt(timescale):
    kw = dict(warmup=5, timescale=timescale)
    cooldown = range(80, 100)
    factors = [schedule(s, **kw, cooldown=cooldown) / schedule(s, **kw, cooldown=None) for s in range(70, 100)]
    assert factors[:11] == [1.0] * 11  # the trunk, and the first step of the cooldown
    assert factors[10:] == pytest.approx([1 - math.sqrt(i / 20) for i in range(20)])
    assert factors[15] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.03


# steps ---------------------------------------------------------------------------------------------------------------


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    batches = [(torch.randn(16, 4, generator=generator), torch.randn(16, 1, generator=generator)) for _ in range(130)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    return model, optimizer, batches


def run_fit(model, optimizer, batches, steps, limit=None, at=None, on_window=None, **more):
    """Steps from `steps.start`, or from where `at` stands. `limit`: rows that fit into memory."""
    at = at or Position(steps.start)

    def loss_fn(batch):
        if limit and len(batch[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        errors = (model(batch[0]) - batch[1]).square()
        return errors.sum(), errors.numel()

    task = Task([*model.parameters()], optimizer, batches.__getitem__, loss_fn, lambda s: 0.01 / (s + 1), clip_norm=0.5)
    if on_window:
        more["on_window"] = lambda loss, taken, seconds: on_window(at.step, loss, seconds)
    fit(task, at, steps.stop, **more)


def test_steps_are_adamw_with_clipping():
    """AdamW (arXiv 1711.05101, Algorithm 2) and clipping of the whole gradient's norm, written out."""
    model, optimizer, batches = problem()
    reference = [p.detach().clone().requires_grad_() for p in model.parameters()]
    m, v = [torch.zeros_like(p) for p in reference], [torch.zeros_like(p) for p in reference]
    clipped = 0
    for step in range(7):
        x, y = batches[step]
        w1, b1, w2, b2 = reference
        loss = (torch.nn.functional.gelu(x @ w1.T + b1) @ w2.T + b2 - y).square().mean()
        gradients = torch.autograd.grad(loss, reference)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        clipped += norm > 0.5
        lr = 0.01 / (step + 1)
        with torch.no_grad():
            for p, g, m_, v_ in zip(reference, gradients, m, v):
                g = g * min(1.0, 0.5 / (norm.item() + 1e-6))
                m_.mul_(0.9).add_(0.1 * g)
                v_.mul_(0.95).add_(0.05 * g * g)
                p.mul_(1 - lr * 0.1)
                m_hat, v_hat = m_ / (1 - 0.9 ** (step + 1)), v_ / (1 - 0.95 ** (step + 1))
                p.sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))
    assert clipped > 3
    run_fit(model, optimizer, batches, range(7))
    for p, expected in zip(model.parameters(), reference):
        assert torch.allclose(p, expected, rtol=1e-5, atol=1e-6)


def test_steps_in_two_parts_are_the_same_steps():
    whole, parts = problem(), problem()
    run_fit(*whole, range(60))
    run_fit(*parts, range(23))
    run_fit(*parts, range(23, 60))
    run_fit(*parts, range(60, 60))  # nothing
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), parts[0].parameters()))


def test_windows_end_at_multiples_and_at_the_end():
    seen = []
    run_fit(*problem(), range(20, 130), on_window=lambda step, loss, seconds: seen.append((step, loss, seconds)))
    assert [step for step, _, _ in seen] == [50, 100, 130]
    assert all(math.isfinite(loss) and seconds > 0 for _, loss, seconds in seen)


def test_the_loss_of_a_window_is_its_mean():
    model, optimizer, batches = problem()
    losses = []

    def loss_fn(batch):
        errors = (model(batch[0]) - batch[1]).square()
        losses.append(errors.mean().item())
        return errors.sum(), errors.numel()

    seen = []
    task = Task([*model.parameters()], optimizer, batches.__getitem__, loss_fn, lambda s: 0.01, clip_norm=1.0)
    fit(task, Position(), 60, on_window=lambda loss, taken, seconds: seen.append((loss, taken)))
    assert [taken for _, taken in seen] == [50, 10]
    assert [loss for loss, _ in seen] == pytest.approx([sum(losses[:50]) / 50, sum(losses[50:]) / 10])


# divergence ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [range(130), range(10, 90)])
@pytest.mark.parametrize("bad", [10, 49, 50, 77])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_names_the_first_bad_step(steps, bad, value):
    model, optimizer, batches = problem()
    batches[bad] = (batches[bad][0], batches[bad][1] * value)
    seen = []
    with pytest.raises(Diverged, match=f"not finite at step {bad}$") as caught:
        run_fit(model, optimizer, batches, steps, on_window=lambda step, loss, seconds: seen.append(step))
    assert caught.value.step == bad
    assert all(step <= bad for step in seen)  # nobody was told of a window that holds it


def test_a_gradient_that_is_not_finite_is_divergence_although_the_loss_is():
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=0.0)

    def loss_fn(batch):
        return (parameter if batch[0] == 3 else parameter + 1).sqrt().sum(), 1  # d/dx sqrt(x) is infinite at 0

    def batch_at(step):
        return (torch.tensor([step]),)

    with pytest.raises(Diverged) as caught:
        fit(Task([parameter], optimizer, batch_at, loss_fn, lambda step: 0.0, clip_norm=1.0), Position(), WINDOW)
    assert caught.value.step == 3


# stopping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_done", [1, 23, 50, 51, 99, 130])
def test_what_was_stopped_goes_on_as_if_it_had_not_been(steps_done):
    whole, parts, seen_whole, seen = problem(), problem(), [], []
    run_fit(*whole, range(130), on_window=lambda step, loss, seconds: seen_whole.append((step, loss)))

    def should_stop():
        return parts[1].state and next(iter(parts[1].state.values()))["step"] == steps_done

    kw = dict(at=Position(), on_window=lambda step, loss, seconds: seen.append((step, loss)))
    with pytest.raises(Interrupted, match=f"stopped after {steps_done} steps"):
        run_fit(*parts, range(130), should_stop=should_stop, **kw)
    assert kw["at"].step == steps_done and kw["at"].seconds > 0
    run_fit(*parts, range(130), **kw)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), parts[0].parameters()))
    assert seen == seen_whole


def test_a_stop_asked_for_before_the_first_step_takes_none():
    model, optimizer, batches = problem()
    before = [p.detach().clone() for p in model.parameters()]
    at = Position(7)
    with pytest.raises(Interrupted):
        run_fit(model, optimizer, batches, range(7, 60), at=at, should_stop=lambda: True)
    assert (at.step, at.window) == (7, None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    run_fit(model, optimizer, batches, range(7, 7), should_stop=lambda: True)  # nothing to stop


def test_divergence_in_the_window_of_a_stop_keeps_its_step():
    model, optimizer, batches = problem()
    batches[3] = (batches[3][0], batches[3][1] * math.nan)
    calls = iter(range(60))
    at = Position()
    with pytest.raises(Interrupted):
        run_fit(model, optimizer, batches, range(60), at=at, should_stop=lambda: next(calls) == 10)
    with pytest.raises(Diverged, match="not finite at step 3$"):
        run_fit(model, optimizer, batches, range(60), at=at)


# memory --------------------------------------------------------------------------------------------------------------


def gradients(limit=None, rows=16):
    """Of one step on `rows` rows, of which `limit` fit into memory at once; and what the loop said and saw."""
    model, optimizer, batches = problem()
    batches = [tuple(t[:rows] for t in batch) for batch in batches]
    said, losses = [], []
    kw = dict(on_split=said.append, on_window=lambda step, loss, seconds: losses.append(loss))
    run_fit(model, optimizer, batches, range(1), limit, **kw)
    return [p.grad.clone() for p in model.parameters()], said, losses[0]


@pytest.mark.parametrize(("rows", "limit", "parts_of"), [(16, 8, 8), (16, 7, 4), (16, 1, 1), (15, 8, 8), (10, 3, 3)])
def test_the_gradient_in_parts_is_that_of_the_whole_batch(rows, limit, parts_of):
    whole, said, loss = gradients(rows=rows)
    assert said == []
    parts, said, loss_in_parts = gradients(limit, rows)
    assert said == [parts_of]
    assert loss_in_parts == pytest.approx(loss, rel=1e-6)
    for a, b in zip(parts, whole):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_training_in_parts_ends_at_the_same_loss_and_keeps_to_its_parts():
    whole, parts, sizes, said, seen_whole, seen = problem(), problem(), [], [], [], []
    run_fit(*whole, range(130), on_window=lambda step, loss, seconds: seen_whole.append(loss))
    first = parts[0][0].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    kw = dict(on_split=said.append, on_window=lambda step, loss, seconds: seen.append(loss))
    run_fit(*parts, range(100), 4, **kw)
    run_fit(*parts, range(130), 4, at=Position(100, micro_batch=said[0]), **kw)
    first.remove()
    assert said == [4] and set(sizes) == {4} and len(sizes) == 4 * 130  # only the first step was tried larger
    assert seen == pytest.approx(seen_whole, rel=1e-6)
    for a, b in zip(parts[0].parameters(), whole[0].parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


class Answers(NamedTuple):
    """As a language model's batch: rows with different numbers of answers, and a field that is not there."""

    x: Any
    y: Any
    asked: Any
    extra: Any


def test_parts_with_different_numbers_of_terms_weigh_by_them():
    found = []
    for limit in (None, 3):
        model, optimizer, batches = problem()
        asked = torch.arange(16)[:, None] % 5 == 0  # 1, 0 or 2 of a part of 3
        batch = Answers(*batches[0], asked, None)

        def loss_fn(b, model=model, limit=limit):
            assert isinstance(b, Answers) and b.extra is None
            if limit and len(b.x) > limit:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"
                )
            errors = (model(b.x) - b.y).square() * b.asked
            return errors.sum(), b.asked.sum()

        task = Task([*model.parameters()], optimizer, lambda step, b=batch: b, loss_fn, lambda s: 0.01, clip_norm=1e9)
        fit(task, Position(), 1)
        found.append([p.grad.clone() for p in model.parameters()])
    model = problem()[0]
    asked = torch.arange(16) % 5 == 0
    (model(batch.x[asked]) - batch.y[asked]).square().mean().backward()
    for whole, parts, plain in zip(*found, (p.grad for p in model.parameters())):
        assert torch.allclose(whole, plain, rtol=1e-5, atol=1e-6) and torch.allclose(parts, plain, rtol=1e-5, atol=1e-6)


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.rows = len(x)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradient


def test_memory_that_runs_out_half_way_back_leaves_nothing_behind():
    """The last layer has its gradient by then."""
    found = []
    for fails in (False, True):
        model, optimizer, batches = problem()

        def loss_fn(batch, model=model, fails=fails):
            hidden = model[1](model[0](batch[0]))
            errors = (model[2](FailsBackward.apply(hidden) if fails else hidden) - batch[1]).square()
            return errors.sum(), errors.numel()

        task = Task([*model.parameters()], optimizer, batches.__getitem__, loss_fn, lambda s: 0.01, clip_norm=1e9)
        fit(task, Position(), 1)
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found))


def test_one_row_that_does_not_fit_is_the_end():
    with pytest.raises(
        OutOfMemory, match="^out of memory with one sample at a time .*CUDA out of memory.* smaller shape"
    ):
        run_fit(*problem(), range(3), limit=0.5)


def test_other_errors_are_not_taken_for_memory():
    model, optimizer, batches = problem()
    batches[0] = (batches[0][0], torch.zeros(16, 3, 5))
    with pytest.raises(RuntimeError, match="must match the size"):
        run_fit(model, optimizer, batches, range(3))


REAL = """
import resource, torch
from sovit.train.loop import Position, Task, fit
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
batch = (torch.randn(4096, 8, generator=generator), torch.randn(4096, 1, generator=generator))

def run(batch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 2048), torch.nn.GELU(), torch.nn.Linear(2048, 1))
    def loss_fn(b):
        errors = (model(b[0]) - b[1]).square()
        return errors.sum(), errors.numel()
    said, losses = [4096], []
    optimizer = torch.optim.AdamW(model.parameters())
    task = Task([*model.parameters()], optimizer, lambda step: batch, loss_fn, lambda step: 1e-3, clip_norm=1.0)
    fit(task, Position(), 2, on_split=said.append, on_window=lambda loss, taken, seconds: losses.append(loss))
    print(said[-1], losses[0])

run([t[:4] for t in batch])  # imports what is imported late
taken = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
endless = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (taken + 50 * 2**20, endless[1]))  # the hidden layer of the whole batch takes 32 MiB
run(batch)
resource.setrlimit(resource.RLIMIT_AS, endless)
run(batch)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_the_cpus_own_allocator_running_out():
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    _, (rows, loss), (all_rows, whole) = (line.split() for line in done.stdout.splitlines())
    assert int(rows) < int(all_rows) == 4096
    assert float(loss) == pytest.approx(float(whole), rel=1e-6)

"""The optimisation loop against torch's own pieces, the schedule against its formulas, and divergence by step."""

import math

import pytest
import torch

from sovit.loop import WINDOW, Diverged, fit, schedule

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


def run_fit(model, optimizer, batches, steps, **more):
    def loss_fn(batch):
        return (model(batch[0]) - batch[1]).square().mean()

    kw = dict(clip_norm=0.5, **more)
    fit(model.parameters(), optimizer, batches.__getitem__, loss_fn, lambda s: 0.01 / (s + 1), steps, **kw)


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
        loss = (model(batch[0]) - batch[1]).square().mean()
        losses.append(loss.item())
        return loss

    seen = []
    fit(
        model.parameters(),
        optimizer,
        batches.__getitem__,
        loss_fn,
        lambda s: 0.01,
        range(60),
        clip_norm=1.0,
        on_window=lambda step, loss, seconds: seen.append(loss),
    )
    assert seen == pytest.approx([sum(losses[:50]) / 50, sum(losses[50:]) / 10])


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

    def loss_fn(step):
        return (parameter if step == 3 else parameter + 1).sqrt().sum()  # d/dx sqrt(x) is infinite at 0

    with pytest.raises(Diverged) as caught:
        fit([parameter], optimizer, lambda step: step, loss_fn, lambda step: 0.0, range(WINDOW), clip_norm=1.0)
    assert caught.value.step == 3

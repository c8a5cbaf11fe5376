"""The fake GPU itself: it refuses what a GPU would, and sees what the host would wait for."""

from collections.abc import Callable

import pytest
import torch
from fake_cuda import _backward, fake_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x.argmax()),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "to": lambda x: x.to("cpu", non_blocking=False),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "list to the GPU": lambda x: x.new_tensor([1.0, 2.0]),
    "tensor to the GPU": lambda x: torch.zeros(3).to(x.device),
    "copy into the CPU": lambda x: torch.zeros(3).copy_(x),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_waits_for_the_gpu_is_counted_with_its_line(read):
    with fake_cuda() as waits:
        x = torch.ones(3, device="cuda")
        x = x * 2 + x.new_full((), 3)
        assert waits.found == []

        read(x)

    assert waits.found
    assert "test_fake_gpu.py" in waits.found[0]


def test_a_copy_that_is_not_waited_for_is_none_of_them():
    with fake_cuda() as waits:
        torch.zeros(3).to("cuda", non_blocking=True)

    assert (waits.found, waits.copies) == ([], 1)


def test_tensors_of_two_devices_are_refused():
    with fake_cuda():
        x = torch.ones(3, device="cuda")

        with pytest.raises(FakeTensorDeviceMismatchError):
            x + torch.ones(3)


def test_the_cpu_is_real():
    with fake_cuda() as waits:
        counts = torch.arange(6)

        assert counts[counts > 2].tolist() == [3, 4, 5]
        assert counts.sum().item() == 15
        assert waits.found == []


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * 2 * ctx.saved_tensors[0]


class _OfTheWrongDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return torch.ones(ctx.shape)


def loss_of(device):
    torch.manual_seed(0)
    with torch.device(device):
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
        )
    x = torch.randn(2, 3, 4, 4, device=device)
    logits = network(x)
    return network, (_Square.apply(logits).log_softmax(-1) * logits).sum() + logits.logsumexp(0)[0]


def test_the_backward_pass_in_python_is_that_of_the_engine():
    network, loss = loss_of("cpu")
    loss.backward()
    expected = [parameter.grad for parameter in network.parameters()]
    network, loss = loss_of("cpu")
    with torch.no_grad():
        _backward([loss], [None], ())

    found = [parameter.grad for parameter in network.parameters()]
    torch.testing.assert_close(found, expected)


def test_gradients_are_on_the_gpu():
    with fake_cuda() as waits:
        network, loss = loss_of("cuda")
        waits.clear()

        loss.backward()

        assert waits.found == []
        gradients = [parameter.grad for parameter in network.parameters()]
        assert {gradient.device.type for gradient in gradients} == {"cuda"}
        wanted = torch.autograd.grad(loss_of("cuda")[1], network.parameters(), allow_unused=True)
        assert len(wanted) == len(gradients)


def test_a_gradient_on_the_wrong_device_is_refused():
    with fake_cuda():
        x = torch.ones(3, device="cuda", requires_grad=True)

        with pytest.raises(RuntimeError, match="gradient on cpu"):
            _OfTheWrongDevice.apply(x).sum().backward()


@pytest.mark.parametrize("bfloat16", [True, False])
def test_autocast_is_on(bfloat16):
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    with fake_cuda(bfloat16=bfloat16):
        with torch.device("cuda"):
            layer = nn.Linear(3, 2)
        with torch.autocast("cuda", dtype):
            assert layer(torch.ones(1, 3, device="cuda")).dtype == dtype
        assert torch.cuda.is_bf16_supported() == bfloat16


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaled_step_waits_unless_the_optimiser_is_fused(fused):
    with fake_cuda() as waits:
        with torch.device("cuda"):
            layer = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cuda")
        for _ in range(2):
            scaler.scale(layer(torch.ones(1, 3, device="cuda")).sum()).backward()
            waits.clear()
            scaler.step(optimizer)
            scaler.update()

            assert bool(waits.found) != fused

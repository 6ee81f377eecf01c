import copy

import pytest
import torch
from eff_kernels.edit import Distiller, cosine
from torch import nn
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3, 3)

    def forward(self, x):
        return self.proj(x), None


class Net(nn.Module):
    def __init__(self, names=("a", "b")):
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, Attention())
        self.reentrant = None

    def forward(self, x):
        for name in self.names:
            layer = lambda x, name=name: x + getattr(self, name)(x)[0]  # noqa: E731
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return Net(), Net()


X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))


def both(student, teacher):
    student(X)
    with torch.no_grad():
        teacher(X)


def by_hand(student, teacher):
    total, x, y = 0.0, X, X
    for name in student.names:
        ours, theirs = getattr(student, name)(x)[0], getattr(teacher, name)(y)[0].detach()
        total = total + (ours - theirs).square().mean()
        x, y = x + ours, (y + theirs).detach()
    return total / len(student.names)


def test_loss_and_gradient_by_hand(pair):
    student, teacher = pair
    with Distiller(student, teacher, "re:[ab]") as distiller:
        both(*pair)
        loss = distiller.loss()
    loss.backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    wanted = by_hand(*pair)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, [p.grad for p in student.parameters()])
    assert all(p.grad is None for p in teacher.parameters())
    assert not student.a._forward_hooks


def test_checkpointing_gives_the_same_or_says_so(pair):
    student, teacher = pair
    with Distiller(student, teacher, "re:[ab]") as distiller:
        both(*pair)
        wanted = distiller.loss()
        student.reentrant = False
        both(*pair)
        loss = distiller.loss()
        assert torch.equal(loss, wanted)
        (loss + student(X).sum()).backward()  # runs layers again, which is no new output
        with pytest.raises(RuntimeError, match="no output of the teacher"):
            distiller.loss()
        student.reentrant = True
        student(X.clone().requires_grad_())
        with torch.no_grad():
            teacher(X)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            distiller.loss()


def test_measuring_needs_no_gradient(pair):
    with Distiller(*pair, "re:[ab]") as distiller, torch.no_grad():
        both(*pair)
        torch.testing.assert_close(distiller.loss(), by_hand(*pair))


def test_a_copy_of_the_student_does_not_speak_for_it(pair):
    student, teacher = pair
    with Distiller(student, teacher, "re:[ab]") as distiller:
        copied = copy.deepcopy(student)
        both(*pair)
        with torch.no_grad():
            copied(10 * X)
        torch.testing.assert_close(distiller.loss(), by_hand(*pair))


def test_each_loss_needs_a_run_of_both(pair):
    student, teacher = pair
    with Distiller(student, teacher, "a") as distiller:
        student(X)
        with pytest.raises(RuntimeError, match="a: no output of the teacher"):
            distiller.loss()
        teacher(X)
        with pytest.raises(RuntimeError, match="a: no output of the student"):
            distiller.loss()


def test_weight_by_progress_and_other_errors(pair):
    l1 = lambda a, b: (a - b).abs().mean()  # noqa: E731
    with Distiller(*pair, "a", weight=cosine(0.1, 0.01), error=l1) as distiller:
        wanted = l1(pair[0].a(X)[0], pair[1].a(X)[0])
        for progress, factor in ((0.0, 0.1), (0.5, 0.055), (1.0, 0.01), (2.0, 0.01)):
            both(*pair)
            torch.testing.assert_close(distiller.loss(progress), factor * wanted)


def test_modules_match_by_name_or_by_order(pair):
    student, other = pair[0], Net(("c", "d"))
    with pytest.raises(ValueError, match="only one of the models has"):
        Distiller(student, other, lambda n, m: isinstance(m, Attention))
    with Distiller(student, other, lambda n, m: isinstance(m, Attention), match="order") as distiller:
        both(student, other)
        distiller.loss()
    assert distiller.layers == ("a", "b")
    with pytest.raises(ValueError, match="selects 0 modules of the student"):
        Distiller(student, pair[1], "x")
    with pytest.raises(ValueError, match="the student has 2 such modules, the teacher 1"):
        Distiller(student, Net(("c",)), lambda n, m: isinstance(m, Attention), match="order")
    with pytest.raises(ValueError, match="match='size'"):
        Distiller(*pair, "a", match="size")


def test_shapes_must_agree(pair):
    student, teacher = pair
    with Distiller(student, teacher, "a") as distiller:
        student(X)
        teacher(X[:1])
        with pytest.raises(ValueError, match=r"a: the student gives \[2, 5, 3\], the teacher \[1, 5, 3\]"):
            distiller.loss()

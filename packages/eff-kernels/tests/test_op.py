import sys
import types

import pytest
import torch
from eff_kernels import block_map, explain, rms_norm, scored_decode_attention
from eff_kernels.op import Backend, BackendError, Op, triton_backend
from eff_kernels.ops.rms_norm import api as rms_api
from torch import Tensor
from torch.autograd import forward_ad


def even_only(x, factor):
    return None if x.size(0) % 2 == 0 else f"needs an even length, got {x.size(0)}"


def make_op(name, calls, **options):
    """x * factor, by a backend that takes even lengths alone and a reference that takes all."""

    def run_as(backend):
        def run(x, factor):
            calls.append(backend)
            return x * factor

        return run

    return Op(
        name,
        "(Tensor x, float factor) -> Tensor",
        [Backend("even", run_as("even"), even_only), Backend("reference", run_as("reference"))],
        fake=lambda x, factor: torch.empty_like(x),
        **options,
    )


def scale_context(ctx, inputs, output):
    ctx.factor = inputs[1]


@pytest.fixture(scope="module")
def calls():
    return []


@pytest.fixture(scope="module")
def plain(calls):
    return make_op("testing_plain", calls)


@pytest.fixture(scope="module")
def smooth(calls):
    """The same with a backward, which notes the backend that it was told."""

    def backward(ctx, grad):
        calls.append(f"backward of {ctx.backend}")
        return grad * ctx.factor, None

    return make_op("testing_smooth", calls, setup_context=scale_context, backward=backward)


@pytest.fixture(autouse=True)
def _forget(calls):
    calls.clear()


@pytest.mark.parametrize(("length", "taken"), [(4, "even"), (3, "reference")])
def test_auto_takes_the_first_that_does_not_reject(plain, calls, length, taken):
    assert torch.equal(plain(torch.ones(length), 2.0), torch.full((length,), 2.0))
    assert calls == [taken]
    assert plain.select_backend(torch.ones(length), 2.0).name == taken
    assert plain.explain(torch.ones(length), 2.0).chosen == taken


def test_named_backend_runs(plain, calls):
    plain(torch.ones(4), 2.0, backend="reference")
    assert calls == ["reference"]


def test_named_backend_never_falls_back(plain, calls):
    with pytest.raises(BackendError, match="'even' cannot run this call: needs an even length, got 3"):
        plain(torch.ones(3), 2.0, backend="even")
    assert calls == []


def test_unknown_backend_lists_the_known(plain):
    with pytest.raises(ValueError, match="unknown backend 'odd'; use 'auto', 'even', 'reference'"):
        plain(torch.ones(3), 2.0, backend="odd")


def test_explain_gives_each_reason(plain):
    explanation = plain.explain(torch.ones(3), 2.0)
    assert explanation.reasons == {"even": "needs an even length, got 3", "reference": None}
    assert str(explanation).splitlines() == [
        "testing_plain: auto takes reference",
        "  even: needs an even length, got 3",
        "  reference: runs",
    ]


def test_explain_takes_a_public_function_and_its_arguments():
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    explanation = explain(rms_norm, x, torch.ones(3), eps=1e-3)
    assert (explanation.op, explanation.chosen) == ("rms_norm", "reference")
    assert "torch.float64" in explanation.reasons["cpu"]
    assert explanation.reasons["reference"] is None
    assert explain(scored_decode_attention, *decode(), score_block=2).op == "scored_decode_attention"


def decode():
    return torch.ones(1, 2, 4), torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), torch.tensor([3], dtype=torch.int32)


def test_explain_computes_nothing_and_refuses_what_a_call_refuses(monkeypatch):
    def fail(*args):
        raise AssertionError("a backend ran")

    monkeypatch.setattr(rms_api.OP, "backends", tuple(Backend(b.name, fail, b.reject) for b in rms_api.OP.backends))
    assert explain(rms_norm, torch.ones(3), torch.ones(3)).reasons["reference"] is None
    with pytest.raises(ValueError, match=r"weight must have shape \[3\]"):
        explain(rms_norm, torch.ones(3), torch.ones(4))
    with pytest.raises(TypeError, match="block_map runs no op"):
        explain(block_map, torch.ones(3))


def test_auto_without_any_backend_raises_with_all_reasons():
    op = Op(
        "testing_none",
        "(Tensor x, float factor) -> Tensor",
        [Backend("even", lambda x, factor: x * factor, even_only)],
        fake=lambda x, factor: torch.empty_like(x),
    )
    with pytest.raises(BackendError, match=r"no backend of testing_none(.|\n)*needs an even length, got 3"):
        op(torch.ones(3), 2.0)
    assert op.explain(torch.ones(3), 2.0).chosen is None


@pytest.mark.parametrize("backend", ["auto", "even", "reference"])
def test_backward_knows_the_backend_of_the_forward(smooth, calls, backend):
    x = torch.ones(2, requires_grad=True)
    smooth(x, 3.0, backend=backend).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 3.0))
    assert calls == ["even" if backend == "auto" else backend, f"backward of {backend}"]


def test_backward_without_saved_state(calls):
    op = make_op("testing_stateless", calls, backward=lambda ctx, grad: (grad * 5, None))
    x = torch.ones(2, requires_grad=True)
    op(x, 5.0).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 5.0))


def test_parameters_and_no_grad(smooth):
    weight = torch.nn.Parameter(torch.ones(2))
    assert smooth(weight, 2.0).requires_grad
    with torch.no_grad():
        assert not smooth(weight, 2.0).requires_grad
    with torch.inference_mode():
        assert smooth(weight, 2.0).is_inference()


def test_op_without_backward_refuses_a_gradient_instead_of_losing_it(plain):
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        plain(x, 2.0).sum().backward()


def test_compiles_to_one_graph_of_one_node(smooth):
    graphs = []

    def look(module, _):
        graphs.append([n.name for n in module.graph.nodes if n.op == "call_function"])
        return module.forward

    compiled = torch.compile(lambda x: smooth(x, 2.0, backend="even"), fullgraph=True, backend=look)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert len(graphs) == 1
    assert len(graphs[0]) == 1


class Noting(Tensor):
    """A tensor subclass that sees each op that runs on it."""

    seen = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclass_sees_the_op(plain):
    Noting.seen.clear()
    plain(torch.ones(2).as_subclass(Noting), 2.0)
    assert any("testing_plain" in name for name in Noting.seen)


def test_tracing_sees_the_op(plain):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda x: plain(x, 2.0))(torch.ones(2)).graph
    assert any("testing_plain" in str(n.target) for n in graph.nodes)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(plain):
    assert torch.equal(torch.vmap(lambda x: plain(x, 2.0))(torch.ones(3, 2)), torch.full((3, 2), 2.0))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own use of it
def test_forward_mode_is_refused_instead_of_losing_the_tangent(smooth):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with pytest.raises(NotImplementedError, match="testing_smooth has no forward-mode derivative"):
            smooth(dual, 2.0)
        assert torch.equal(smooth(torch.ones(2), 2.0), torch.full((2,), 2.0))


def test_opcheck(smooth):
    torch.library.opcheck(smooth.registered, (torch.ones(2), 2.0, "auto"))


@pytest.fixture
def kernels(monkeypatch):
    """A module of Triton kernels that was not imported before."""
    module = types.ModuleType("testing_kernels")
    module.reject = lambda x: None if x.dim() == 1 else f"needs a vector, got {x.dim()} dimensions"
    module.run = lambda x: x + 1
    module.other_run, module.other_reject = (lambda x: x + 2), (lambda x: None)
    monkeypatch.setitem(sys.modules, "testing_kernels", module)
    return module


def test_triton_wants_a_gpu_or_the_interpreter(kernels, monkeypatch):
    backend = triton_backend("testing_kernels")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.reject(torch.ones(2)) == "needs a CUDA or ROCm tensor, got one on cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.reject(torch.ones(2)) is None
    assert backend.reject(torch.ones(2, 2)) == "needs a vector, got 2 dimensions"
    assert backend.reject(torch.ones(2, device="meta")) == "needs a CUDA or ROCm tensor, got one on meta"
    assert torch.equal(backend.run(torch.ones(2)), torch.full((2,), 2.0))


def test_triton_functions_by_name(kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend = triton_backend("testing_kernels", run="other_run", reject="other_reject")
    assert backend.reject(torch.ones(2, 2)) is None
    assert torch.equal(backend.run(torch.ones(2)), torch.full((2,), 3.0))


def test_triton_that_is_not_installed(kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("eff_kernels.op._has_triton", lambda: False)
    assert "pip install" in triton_backend("testing_kernels").reject(torch.ones(2))


def test_module_of_kernels_is_not_imported_before_it_can_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend = triton_backend("testing_kernels_that_do_not_exist")
    assert "needs a CUDA" in backend.reject(torch.ones(2))

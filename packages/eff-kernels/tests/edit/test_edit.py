import copy

import pytest
import torch
from eff_kernels.edit import Handle, Report, SkippedModulesError, fits, matches, replace_module, select
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj")})
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x + self.attn["k_proj"](self.attn["q_proj"](x)))


def make_model():
    model = nn.Sequential()
    model.add_module("layers", nn.Sequential(Block(), Block()))
    model.add_module("lm_head", nn.Linear(4, 3))
    return model


def snapshot(model):
    """Everything that makes a model what it is: module objects by name, tensors by name, output."""
    modules = {name: id(m) for name, m in model.named_modules(remove_duplicate=False)}
    tensors = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return modules, tensors, model(torch.linspace(-1, 1, 4)[None])


def assert_same(before, after):
    assert before[0] == after[0]
    assert list(before[0]) == list(after[0])  # the order too
    assert before[1].keys() == after[1].keys()
    assert all(before[1][k][0] == after[1][k][0] and torch.equal(before[1][k][1], after[1][k][1]) for k in before[1])
    assert torch.equal(before[2], after[2])


@pytest.mark.parametrize(
    ("name", "pattern", "wanted"),
    [
        ("layers.0.attn.q_proj", "q_proj", True),
        ("layers.0.attn.q_proj", "attn.q_proj", True),
        ("layers.0.attn.q_proj", "layers.0.attn.q_proj", True),
        ("q_proj", "q_proj", True),
        ("layers.0.attn.seq_proj", "q_proj", False),  # parts are whole words
        ("layers.0.attn.q_proj", "layers.0", False),  # the last parts, not the first
        ("layers.0.attn.q_proj", "layers.*.q_proj", True),
        ("layers.0.attn.q_proj", "*.attn.*", True),
        ("layers.0.attn.q_proj", "layers.1.*", False),
        ("layers.10.x", "layers.?.x", False),
        ("layers.3.x", "layers.[1-3].x", True),
        ("layers.3.X", "layers.*.x", False),
        ("layers.12.x", r"re:layers\.(1\d)\.x", True),
        ("layers.120.x", r"re:layers\.(1\d)\.x", False),
        ("layers.12.x.y", r"re:layers\.(1\d)\.x", False),  # the whole name
        ("", "*", True),
    ],
)
def test_matches(name, pattern, wanted):
    assert matches(name, pattern) is wanted


def test_fits_takes_a_pattern_several_or_a_predicate():
    module = nn.Linear(2, 2)
    assert fits("q_proj", "a.q_proj", module)
    assert fits(["k_proj", "q_proj"], "a.q_proj", module)
    assert not fits([], "a.q_proj", module)
    assert fits(lambda name, m: name.startswith("a.") and m is module, "a.q_proj", module)


def test_select_keeps_the_order_and_the_class():
    model = make_model()
    assert [n for n, _ in select(model, kind=nn.Linear)] == [
        *("layers.0.attn.q_proj", "layers.0.attn.k_proj", "layers.1.attn.q_proj", "layers.1.attn.k_proj"),
        "lm_head",
    ]
    assert [n for n, _ in select(model, ["q_proj", "lm_head"])] == [
        *("layers.0.attn.q_proj", "layers.1.attn.q_proj", "lm_head"),
    ]
    assert [n for n, _ in select(model, lambda n, m: m.training and n.endswith("norm"))] == [
        *("layers.0.norm", "layers.1.norm"),
    ]
    assert all(m is model.get_submodule(n) for n, m in select(model))


def test_select_gives_a_shared_module_once_under_the_first_name_that_fits():
    model = make_model()
    model.layers[1].attn["q_proj"] = model.layers[0].attn["q_proj"]
    assert [n for n, _ in select(model, "q_proj")] == ["layers.0.attn.q_proj"]
    assert [n for n, _ in select(model, "layers.1.*", nn.Linear)] == ["layers.1.attn.q_proj", "layers.1.attn.k_proj"]


def test_model_may_change_while_it_is_walked():
    model = make_model()
    for name, linear in select(model, kind=nn.Linear):
        replace_module(model, name, nn.Sequential(linear))
    assert sum(1 for _ in select(model, kind=nn.Linear)) == 5


def test_replace_module():
    model, new = make_model(), nn.Identity()
    old = model.layers[1].attn["k_proj"]
    assert replace_module(model, "layers.1.attn.k_proj", new) is old
    assert model.layers[1].attn["k_proj"] is new
    assert list(model.layers[1].attn) == ["q_proj", "k_proj"]


def test_replace_module_in_all_places_of_a_shared_one():
    model, new = make_model(), nn.Identity()
    model.layers[1].attn["q_proj"] = model.layers[0].attn["q_proj"]
    replace_module(model, "layers.1.attn.q_proj", new)
    assert model.layers[0].attn["q_proj"] is new
    assert model.layers[1].attn["q_proj"] is new


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("", ValueError, "the model itself"),
        ("layers.7", AttributeError, "7"),
        ("layers.0.attn.v_proj", AttributeError, "v_proj"),
        ("lm_head.weight", AttributeError, "weight"),  # a parameter is no module
    ],
)
def test_replace_module_that_is_not_there(name, error, text):
    model = make_model()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        replace_module(model, name, nn.Identity())
    with pytest.raises(error, match=text):
        Handle().replace(model, name, nn.Identity())
    assert_same(before, snapshot(model))


def test_handle_restores_bit_for_bit_and_only_once():
    model = make_model()
    before = snapshot(model)
    handle = Handle()
    assert not handle.active
    for name, linear in select(model, kind=nn.Linear):
        handle.replace(model, name, nn.Sequential(linear, nn.Tanh()))
    assert handle.active
    assert not torch.equal(snapshot(model)[2], before[2])
    handle.remove()
    assert not handle.active
    assert_same(before, snapshot(model))
    replace_module(model, "lm_head", other := nn.Linear(4, 3))
    handle.remove()  # has nothing left to take back
    assert model.lm_head is other


def test_handle_is_a_context_manager_also_when_the_block_fails():
    model = make_model()
    before = snapshot(model)
    with pytest.raises(KeyError), Handle() as handle:  # noqa: PT012
        handle.replace(model, "lm_head", nn.Identity())
        raise KeyError
    assert_same(before, snapshot(model))


def test_changes_are_taken_back_latest_first():
    order = []
    handle = Handle()
    for i in range(3):
        handle.on_remove(lambda i=i: order.append(i))
    handle.remove()
    assert order == [2, 1, 0]


def test_nested_handles():
    model = make_model()
    before = snapshot(model)
    with Handle() as outer:
        outer.replace(model, "lm_head", nn.Sequential(model.lm_head, nn.Tanh()))
        middle = snapshot(model)
        with Handle() as inner:
            inner.replace(model, "lm_head", nn.Sequential(model.lm_head, nn.Tanh()))
        assert_same(middle, snapshot(model))
    assert_same(before, snapshot(model))


def test_handles_removed_in_the_wrong_order_say_so_and_can_be_removed_later():
    model = make_model()
    before = snapshot(model)
    first, second = Handle(), Handle()
    first.replace(model, "lm_head", nn.Sequential(model.lm_head, nn.Tanh()))
    second.replace(model, "lm_head", nn.Sequential(model.lm_head, nn.Tanh()))
    with pytest.raises(RuntimeError, match="'lm_head' was changed again"):
        first.remove()
    assert first.active
    second.remove()
    first.remove()
    assert_same(before, snapshot(model))


def test_a_wrapper_gives_back_what_it_holds_by_then():
    model, tanh = make_model(), nn.Tanh()
    wrapper = nn.Sequential(model.lm_head, nn.ReLU())
    handle = Handle()
    handle.replace(model, "lm_head", wrapper, back=lambda: wrapper[0])
    wrapper[0] = tanh
    handle.remove()
    assert model.lm_head is tanh


def test_shared_module_is_shared_again_after_removal():
    model = make_model()
    model.layers[1].attn["q_proj"] = model.layers[0].attn["q_proj"]
    before = snapshot(model)
    with Handle() as handle:
        handle.replace(model, "layers.0.attn.q_proj", nn.Identity())
    assert_same(before, snapshot(model))


def test_module_that_is_in_the_model_already_may_be_the_new_one():
    model = make_model()
    before = snapshot(model)
    with Handle() as handle:
        handle.replace(model, "layers.0.norm", model.layers[1].norm)
        assert model.layers[0].norm is model.layers[1].norm
    assert_same(before, snapshot(model))


def test_hooks_go_through_on_remove():
    model = make_model()
    before = snapshot(model)
    with Handle() as handle:
        handle.on_remove(model.lm_head.register_forward_hook(lambda module, args, output: output + 1).remove)
        torch.testing.assert_close(snapshot(model)[2], before[2] + 1)
    assert_same(before, snapshot(model))


def test_state_dict_of_a_restored_model_loads_into_a_fresh_copy():
    model = make_model()
    fresh = copy.deepcopy(model)
    with Handle() as handle:
        handle.replace(model, "lm_head", nn.Sequential(model.lm_head))
    assert fresh.load_state_dict(model.state_dict()).missing_keys == []


def test_report_counts_names_and_bytes():
    report = Report("quantize")
    report.change("a", bytes_before=4 << 20, bytes_after=1 << 20)
    report.skip("b", "on the skip list", size=2 << 20)
    assert (report.bytes_before, report.bytes_after) == (6 << 20, 3 << 20)
    assert str(report).splitlines() == [
        "quantize: 1 changed, 1 skipped, 6.0 MiB -> 3.0 MiB",
        "  b: skipped, on the skip list",
    ]


def test_strict_report_names_each_skipped_module():
    report = Report("quantize")
    report.change("a")
    report.raise_if_skipped()
    report.skip("b", "in_features=6")
    report.skip("c", "not a Linear")
    with pytest.raises(SkippedModulesError, match="2 modules were skipped\n  b: in_features=6\n  c: not a Linear"):
        report.raise_if_skipped()


def test_empty_report():
    report = Report("nothing")
    report.raise_if_skipped()
    assert str(report) == "nothing: 0 changed, 0 skipped"

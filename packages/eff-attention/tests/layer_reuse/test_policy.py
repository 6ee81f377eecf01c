import pytest
from eff_attention.layer_reuse import LayerReusePolicy


def test_comes_back_from_its_file(tmp_path):
    policy = LayerReusePolicy(("full", "anchor", "reuse"), (-1, -1, 1), 0.5, {"text": "a novel"})
    policy.save(tmp_path / "policy.json")
    assert LayerReusePolicy.load(tmp_path / "policy.json") == policy


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        (("full",), (-1, -1), "must have one length"),
        (("sparse",), (-1,), r"kind\[0\]='sparse'; use one of"),
        (("full", "anchor"), (-1, 0), "layer 1 is of kind 'anchor' and must have source -1, got 0"),
        (("full", "reuse"), (-1, 1), "layer 1 must reuse one of the layers 0 to 0, got source 1"),
        (("full", "reuse"), (-1, -1), "got source -1"),
        (("full", "reuse", "reuse"), (-1, 0, 1), "layer 2 reuses layer 1, which chooses nothing itself"),
    ],
)
def test_refuses_plans_that_cannot_run(kind, source, message):
    with pytest.raises(ValueError, match=message):
        LayerReusePolicy(kind, source)


def test_refuses_another_version_or_record():
    policy = LayerReusePolicy(("full",), (-1,))
    with pytest.raises(ValueError, match="LayerReusePolicy of version 2"):
        LayerReusePolicy.from_dict({**policy.to_dict(), "version": 2})
    with pytest.raises(ValueError, match="record='ReuseProfile'"):
        LayerReusePolicy.from_dict({**policy.to_dict(), "record": "ReuseProfile"})
    with pytest.raises(ValueError, match=r"lacks \['kind', 'source'\]"):
        LayerReusePolicy.from_dict({})

"""What can be asked for, and what is refused with which words."""

import json
import math

import pytest
from eff_studio.work import Generate, Heads, Insert, LayerBox, Segment, Style, kind_of, read_work

BOX = {"prompt": "a dog", "box": [0, 0, 0.5, 1]}


@pytest.mark.parametrize(
    "work",
    [
        Generate(
            prompt="x",
            negative="y",
            seed=2**63 - 1,
            count=8,
            layers=(LayerBox(prompt="a", box=(0, 0, 1, 1)),),
            style=Style(name="ink-1", strength=0.5),
            concepts="rex",
        ),
        Generate(prompt="x", heads=Heads(weights=((0, 1, 0.5), (3, 0, 1)), scale=-2, window=(0.1, 0.9))),
        Generate(layers=(LayerBox(prompt="a", box=(0, 0, 1, 1)),), heads=Heads(weights=((0, 1, 0.5),))),
        Insert(subject="a", target="b", mask="c", strength=1.0),
        Segment(picture="a", phrase="the dog"),
    ],
)
def test_work_travels_as_json(work):
    assert read_work(kind_of(work), json.loads(json.dumps(work.to_dict()))) == work


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": ""}, "no layers"),
        ({"prompt": "  "}, "no layers"),
        ({"prompt": "x" * 2001}, "2001 characters"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "x", "negative": "x" * 2001}, "negative"),
        ({"prompt": "x", "seed": -1}, "seed=-1"),
        ({"prompt": "x", "seed": 2**63}, "seed="),
        ({"prompt": "x", "steps": 0}, "steps=0"),
        ({"prompt": "x", "steps": 201}, "steps=201"),
        ({"prompt": "x", "count": 0}, "count=0"),
        ({"prompt": "x", "count": 9}, "count=9"),
        ({"prompt": "x", "guidance": math.nan}, "guidance=nan"),
        ({"prompt": "x", "guidance": 101}, "guidance=101"),
        ({"prompt": "x", "opacity": 1.1}, "opacity=1.1"),
        ({"prompt": "x", "width": 32}, "width=32"),
        ({"prompt": "x", "height": 4096}, "height=4096"),
        ({"prompt": "x", "layers": [BOX] * 9}, "9 layers"),
        ({"layers": [{**BOX, "box": [0.5, 0, 0.5, 1]}]}, "box="),
        ({"layers": [{**BOX, "box": [0, 0, math.nan, 1]}]}, "box="),
        ({"layers": [{**BOX, "box": [0, 0, 1]}]}, "box"),
        ({"layers": [{"prompt": "a dog"}]}, "lacks"),
        ({"prompt": "x", "heads": {"weights": [[0, 0, 1], [0, 0, 0.5]]}}, "twice"),
        ({"prompt": "x", "heads": {"weights": [[-1, 0, 1]]}}, "layer -1"),
        ({"prompt": "x", "heads": {"weights": [[0, 0, 2]]}}, "strength"),
        ({"prompt": "x", "heads": {"window": [0.9, 0.1]}}, "window"),
        ({"prompt": "x", "style": {"name": "../secret"}}, "style"),
        ({"prompt": "x", "concepts": "a/b"}, "a/b"),
        ({"prompt": "x", "sampler": "best"}, "sampler"),
        ({"prompt": "x", "version": 2}, "version 2"),
    ],
)
def test_what_does_not_work_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        read_work("generate", values)


@pytest.mark.parametrize("values", [{"prompt": 1}, {"prompt": "x", "seed": 1.5}, {"prompt": "x", "count": True}])
def test_other_types_are_refused(values):
    with pytest.raises(TypeError):
        read_work("generate", values)


def test_other_kinds():
    with pytest.raises(ValueError, match="wanted one of generate, insert, segment"):
        read_work("paint", {})
    with pytest.raises(ValueError, match="lacks"):
        read_work("insert", {"subject": "a"})
    with pytest.raises(ValueError, match="phrase is empty"):
        read_work("segment", {"picture": "a", "phrase": " "})

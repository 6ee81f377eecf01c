"""HeadHunter on objectives whose answer is known."""

import itertools

import pytest
import torch
from eff_guidance.head_guidance import (
    Head,
    HeadHunter,
    HeadHunterConfig,
    HeadSet,
    SoftPAGConfig,
    harmonic,
    list_heads,
    pipeline_generator,
)

HEADS = [Head(layer, h) for layer in range(3) for h in range(4)]


class World:
    """Pictures are the guidance they were made with; counts them."""

    def __init__(self, fail_after=None):
        self.made, self.fail_after = 0, fail_after

    def __call__(self, prompts, seeds, guidance):
        self.made += len(prompts)
        if self.fail_after is not None and self.made > self.fail_after:
            raise RuntimeError("out of power")
        return [(guidance, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def worth(values, bonus=None):
    """Adds the worth of heads, some more for heads together; seeds and prompts shift all heads alike."""

    def objective(pictures, prompts):
        assert [p[1] for p in pictures] == prompts
        for guidance, prompt, seed in pictures:
            heads = set(guidance.named)
            score = sum(values.get(head, 0.0) for head in heads) + 10 * seed + len(prompt)
            yield score + sum(more for group, more in (bonus or {}).items() if set(group) <= heads)

    return objective


def hunt(objective, world=None, *, prompts=("a dog", "a cat"), resume=None, **config):
    hunter = HeadHunter(
        world or World(), objective, prompts, config=HeadHunterConfig(**config), heads=HEADS, progress=False
    )
    return hunter.search(resume=resume)


def test_planted_heads_are_found_in_order():
    planted = {Head(1, 2): 3.0, Head(0, 3): 2.0, Head(2, 0): 1.0}
    world = World()
    found = hunt(worth(planted), world, rounds=1, heads_per_round=3)
    assert found.best() == [Head(1, 2), Head(0, 3), Head(2, 0)]
    assert found.finished
    assert world.made == found.generations == 2 * 12
    for rounds, k in ((3, 1), (2, 2), (4, 3)):
        world = World()
        found = hunt(worth(planted), world, rounds=rounds, heads_per_round=k)
        assert found.best(min(3, rounds * k)) == [Head(1, 2), Head(0, 3), Head(2, 0)][: rounds * k]
        assert world.made == found.generations == 2 * sum(12 - k * r for r in range(rounds))


def test_ties_go_by_layer_and_head():
    assert hunt(worth({}), rounds=2, heads_per_round=2).best() == HEADS[:4]

    def near(pictures, prompts):
        return [-abs(len(guidance.heads) - 1) for guidance, _, _ in pictures]

    assert hunt(near, rounds=1, heads_per_round=3).best() == HEADS[:3]


def test_the_number_of_heads_as_objective():
    def distance(pictures, prompts):
        return [-abs(HEADS.index(guidance.named[-1]) - 7) for guidance, _, _ in pictures]

    assert hunt(distance, rounds=1, heads_per_round=3).best() == [HEADS[7], HEADS[6], HEADS[8]]


def test_a_head_that_helps_only_beside_another_needs_two_rounds():
    values = {Head(0, 1): 2.0, Head(1, 1): 1.0, Head(2, 2): -1.0}
    objective = worth(values, {(Head(0, 1), Head(2, 2)): 5.0})
    assert Head(2, 2) not in hunt(objective, rounds=1, heads_per_round=2).best()
    assert hunt(objective, rounds=2, heads_per_round=1).best() == [Head(0, 1), Head(2, 2)]


@pytest.mark.parametrize("stop", [0, 2, 11, 24, 25, 37])
def test_an_interrupted_search_goes_on(tmp_path, stop):
    objective = worth({Head(1, 2): 3.0, Head(0, 3): 2.0}, {(Head(1, 2), Head(2, 1)): 4.0})
    settings = {"rounds": 2, "heads_per_round": 2}
    whole = hunt(objective, **settings)
    path = tmp_path / "search.json"
    with pytest.raises(RuntimeError, match="out of power"):
        hunt(objective, World(fail_after=stop), resume=path, **settings)
    world = World()
    again = hunt(objective, world, resume=path, **settings)
    assert again == whole == HeadSet.load(path)
    assert world.made == whole.generations - 2 * (stop // 2)
    world = World()
    assert hunt(objective, world, resume=path, **settings) == whole
    assert world.made == 0


@pytest.mark.parametrize("change", [{"scale": 2.0}, {"rounds": 3}, {"prompts": ("a dog", "a pig")}])
def test_a_file_of_another_search_is_refused(tmp_path, change):
    hunt(worth({}), resume=tmp_path / "search.json", rounds=2, heads_per_round=1)
    settings = {"rounds": 2, "heads_per_round": 1, **change}
    with pytest.raises(ValueError, match="is of another search"):
        hunt(worth({}), resume=tmp_path / "search.json", **settings)


def test_floors_rule_heads_out():
    values = {Head(1, 2): 3.0, Head(0, 3): 2.0, Head(2, 0): 1.0}

    def clean(pictures, prompts):
        return [0.0 if Head(1, 2) in guidance.named else 6.5 for guidance, _, _ in pictures]

    hunter = HeadHunter(
        World(), worth(values), ["a"], heads=HEADS, floors=[(clean, 6.0)], progress=False,
        config=HeadHunterConfig(rounds=1, heads_per_round=2),
    )  # fmt: skip
    found = hunter.search()
    assert found.best() == [Head(0, 3), Head(2, 0)]
    assert found.rounds[0].passed.count(False) == 1


def test_scores_that_are_no_numbers_are_not_chosen(tmp_path):
    def objective(pictures, prompts):
        return [float("nan") if Head(0, 0) in guidance.named else 1.0 for guidance, _, _ in pictures]

    found = hunt(objective, resume=tmp_path / "search.json", rounds=1, heads_per_round=1)
    assert found.best() == [Head(0, 1)]
    assert found.rounds[0].scores[0] is None
    assert "NaN" not in (tmp_path / "search.json").read_text()


def test_harmonic_mean():
    one, other = (lambda pictures, prompts, x=x: [x, 0.0] for x in (2.0, 6.0))
    assert harmonic(one, other)(["a", "b"], ["", ""]) == [3.0, 0.0]


def test_results_travel(tmp_path):
    found = hunt(worth({Head(1, 2): 3.0}), rounds=1, heads_per_round=2, strength=1.0, scale=4.0)
    found.save(tmp_path / "heads.json")
    loaded = HeadSet.load(tmp_path / "heads.json")
    assert loaded == found
    config = loaded.guidance(1, strength=0.5)
    assert config == SoftPAGConfig(heads=[(1, 2)], strength=0.5, scale=4.0)
    with pytest.raises(TypeError):
        loaded.guidance(1, force=0.5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompts": []}, "0 prompts"),
        ({"seeds": [1]}, "2 prompts and 1 seeds"),
        ({"heads": None}, "pass heads="),
        ({"config": HeadHunterConfig(rounds=7, heads_per_round=2)}, "14 heads cannot be chosen from 12"),
        ({"heads": [*HEADS, HEADS[0]]}, "24 heads cannot be chosen from 12|of 12"),
    ],
)
def test_bad_searches(change, text):
    given = {"prompts": ["a", "b"], "heads": HEADS, "config": HeadHunterConfig(), **change}
    with pytest.raises(ValueError, match=text):
        HeadHunter(World(), worth({}), given.pop("prompts"), **given)


def test_bad_counts_and_scores():
    with pytest.raises(ValueError, match=r"rounds=0; use 1 or more"):
        HeadHunterConfig(rounds=0)
    with pytest.raises(ValueError, match=r"strength=1\.5"):
        HeadHunterConfig(strength=1.5)
    with pytest.raises(ValueError, match="3 scores for 2 pictures"):
        hunt(lambda pictures, prompts: [1.0, 2.0, 3.0], rounds=1, heads_per_round=1)


def test_the_bar(capsys):
    hunter = HeadHunter(
        World(), worth({}), ["a"], heads=HEADS, config=HeadHunterConfig(rounds=1, heads_per_round=1), progress=True
    )
    hunter.search()
    assert "12/12" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["sd3", "flux", "sd15"])
def test_a_pipeline_is_searched(tiny, kind):
    """Each head's pictures are those of the pipeline guided by it, with CFG off, and the same seeds for all."""
    base = tiny.pipeline(kind)
    model = base.transformer if hasattr(base, "transformer") else base.unet

    class Pipe(type(base)):
        """Takes prompts as the tiny pipelines have no encoders."""

        def __call__(self, prompt, **call):
            made = [tiny.prompts(base, seed=len(p), guided=False) for p in prompt]
            given = {name: torch.cat([m[name] for m in made]) for name in made[0]}
            more = {"height": 64, "width": 64, "output_type": "latent", "num_inference_steps": 2}
            return super().__call__(**given, **more, **call)

    extra = {"requires_safety_checker": False} if kind == "sd15" else {}
    pipe = Pipe(**base.components, **extra)
    pipe.set_progress_bar_config(disable=True)
    prompts, heads = ["a dog", "an apple"], list_heads(model)[:3]

    def objective(pictures, prompts):
        return [float(picture.square().mean()) for picture in pictures]

    config = HeadHunterConfig(rounds=2, heads_per_round=1, scale=2.0)
    found = HeadHunter(pipe, objective, prompts, config=config, heads=heads, progress=False).search()
    generate = pipeline_generator(pipe)

    def score(chosen):
        pictures = generate(prompts, [0, 1], config.guidance(chosen))
        return sum(objective(pictures, prompts)) / 2

    first = max(heads, key=lambda head: score([head]))
    second = max((h for h in heads if h != first), key=lambda head: score([first, head]))
    assert found.best() == [first, second]
    assert found.scores == (score([first]), score([first, second]))
    assert type(model).__name__ in found.model
    assert "forward" not in vars(model)
    for pair in itertools.pairwise(found.rounds):
        assert len(pair[1].heads) == len(pair[0].heads) - 1

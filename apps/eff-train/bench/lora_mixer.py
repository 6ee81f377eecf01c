"""Three adapters of SmolLM2 and their mixtures, by task: ``nox -s bench -- train lora_mixer [--seed 1]``.

In one run: the adapters are trained with ``lora-mixer/experts``, the routers with ``lora-mixer/router``; PEFT's X-LoRA
is trained on the same questions for as many updates, PEFT's Arrow is not trained. What is finished lies in ``--folder``
and is not made again. All are judged on the same questions that no update has seen.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from eff_adapters.lora_mixer import LoraMixer, init_routers_from_prompts, load_lora_mixer
from eff_kernels.testing import environment
from eff_train.frame.parallel import Workers
from eff_train.frame.training import Training
from eff_train.recipes.lora_mixer import experts, router
from eff_train.recipes.lora_mixer.scores import answer_logits, answer_loss, judged
from eff_train.recipes.lora_mixer.tasks import TASKS, Batch, batch_of

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results" / "lora_mixer.jsonl"
SOURCES = (
    HERE,
    HERE.parents[1] / "src" / "eff_train" / "recipes" / "lora_mixer",
    HERE.parents[1] / "src" / "eff_train" / "frame" / "training.py",
    HERE.parents[3] / "packages" / "eff-adapters" / "src" / "eff_adapters" / "lora_mixer",
)
NAMES = tuple(TASKS)
PROMPTS = 96  # questions that point the routers without training


class XLora(router.Router):
    """PEFT's X-LoRA in the place of the routers, a weight for each projection."""

    def build(self) -> torch.nn.Module:
        from peft import XLoraConfig, get_peft_model

        base = self.language_model()
        base.config.use_cache = False
        model = get_peft_model(base, XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, layerwise_scalings=True,
            adapters={str(i): str(Path(self.config.adapters, "experts", n)) for i, n in enumerate(NAMES)},
        ))  # fmt: skip
        classifier = model.base_model.internal_xlora_classifier.layers
        classifier.float()  # in bfloat16 its small updates would be lost
        classifier[0].register_forward_pre_hook(lambda module, args: (args[0].float(),))
        return model

    def loss(self, model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        return answer_loss(self.logits(model, batch), batch), {}

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        return model(input_ids=batch.ids).logits[batch.targets >= 0].float()


def trained(recipe: Any) -> tuple[torch.nn.Module, float]:
    """The model of a recipe after all its updates, and the processor time of these in seconds."""
    training = Training(recipe, Workers(0, 1, torch.device("cpu")))
    begun = time.process_time()
    for step in range(recipe.config.steps):
        training.update()
        if step % 20 == 19:
            means = {n: round(v, 3) for n, v in training.read_means().items()}
            print(f"{type(recipe).__name__} {step + 1}/{recipe.config.steps} {means}", flush=True)
    return training.model.eval(), time.process_time() - begun


def mixtures(mixer: LoraMixer, seed: int, recipe: router.Router) -> Iterator[tuple[str, Callable[[Batch], Any]]]:
    """Ways of using the adapters without anything of PEFT."""
    model = mixer.model

    def told(number: int | None) -> Callable[[Batch], Any]:
        def logits(batch: Batch) -> Any:
            with mixer.route(domain_ids=batch.tasks if number is None else torch.full_like(batch.tasks, number)):
                return answer_logits(model, batch)

        return logits

    mixer.set_mode("hard")
    yield "base", told(-1)
    for number, name in enumerate(NAMES):
        yield f"adapter {name}", told(number)
    yield "told the task", told(None)
    mixer.set_mode("sparse")
    yield "LoRA-Mixer, one adapter a token", lambda batch: answer_logits(model, batch)
    mixer.set_mode("soft")
    yield "LoRA-Mixer, soft", lambda batch: answer_logits(model, batch)
    with torch.no_grad():
        for one in mixer.routers.values():
            one.weight.zero_()
    yield "uniform", lambda batch: answer_logits(model, batch)
    some = batch_of(recipe.tokenizer, seed, range(PROMPTS))
    prompts = {}
    for number, name in enumerate(NAMES):
        rows = some.tasks == number
        prompts[name] = [{"input_ids": some.ids[rows], "attention_mask": some.mask[rows].long()}]
    init_routers_from_prompts(mixer, prompts)
    mixer.set_mode("sparse")
    yield "LoRA-Mixer, routers from prompts", lambda batch: answer_logits(model, batch)


def arrow(recipe: router.Router, adapters: Path) -> Any:
    from peft import ArrowConfig, create_arrow_model

    paths = [str(adapters / "experts" / n) for n in NAMES]
    return create_arrow_model(recipe.language_model(), paths, ArrowConfig(top_k=1, router_temperature=1.0)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="for what is trained")
    parser.add_argument("--adapters", type=Path, help="adapters of another seed; only routers and X-LoRA are trained")
    parser.add_argument("--steps", type=int, default=experts.Config.steps, help="updates of the adapters")
    parser.add_argument("--router-steps", type=int, default=router.Config.steps, help="updates of routers and X-LoRA")
    parser.add_argument("--judged", type=int, default=384)
    parser.add_argument("--warmup", type=int, default=experts.Config.warmup)
    parser.add_argument("--no-xlora", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    about = {
        **environment("cpu", SOURCES), "seed": args.seed, "steps": args.steps, "router_steps": args.router_steps,
        "adapters": args.adapters.name if args.adapters else f"adapters-{args.seed}", "questions": args.judged,
        "dtype": "bfloat16", "checked": True,
    }  # fmt: skip

    def judge(name: str, logits_of: Callable[[Batch], Any], **more: Any) -> None:
        found = {n: round(v, 4) for n, v in judged(logits_of, questions).items()}
        entry = {"method": name, **found, **more, **about}
        print(json.dumps(entry), flush=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    first = experts.Experts(experts.Config(steps=args.steps, seed=args.seed, judged=args.judged, warmup=args.warmup))
    questions = first.held_out
    adapters = args.adapters or args.folder / f"adapters-{args.seed}"
    mixture = args.folder / f"mixture-{args.seed}"
    seconds: dict[str, float] = {}
    if args.adapters is None and not adapters.is_dir():
        model, seconds["adapters"] = trained(first)
        first.export(model, adapters)
    config = router.Config(
        steps=args.router_steps, seed=args.seed, adapters=str(adapters), judged=args.judged, warmup=args.warmup
    )
    second = router.Router(config)
    if not mixture.is_dir():
        model, seconds["router"] = trained(second)
        second.export(model, mixture)
    mixer = load_lora_mixer(second.language_model(), mixture)
    for name, logits_of in mixtures(mixer, args.seed, second):
        judge(name, logits_of, train_cpu_s={n: round(s) for n, s in seconds.items()})
    other = arrow(second, adapters)
    judge("Arrow (PEFT)", lambda batch: other(input_ids=batch.ids).logits[batch.targets >= 0].float())
    if not args.no_xlora:
        recipe = XLora(config)
        model, spent = trained(recipe)
        judge("X-LoRA (PEFT)", lambda batch: recipe.logits(model, batch), train_cpu_s={"router": round(spent)})


if __name__ == "__main__":
    main()

"""What training under FP8 noise recovers: ``python packages/eff-quant/bench/fp8_digits.py``.

A dense teacher learns the digits of scikit-learn. Its attention is then exchanged for a sparse one with a linear
branch, whose projections (1024 of 205770 parameters) learn from the attention outputs of the teacher while every linear
layer rounds
to FP8. One record for each format and seed; with ``--plot`` they are drawn.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import torch
from eff_kernels.edit import Distiller
from eff_kernels.testing.machine import device_name
from eff_quant import FP8QATConfig, FP8Spec, convert_qat_, freeze_except_, prepare_qat_

sys.path.insert(0, str(Path(__file__).parent))
from _digits import HELD_OUT, Attention, accuracy, batches, load_digits_images, student_of, train_teacher

RESULTS = Path(__file__).parent / "results" / "fp8_digits.json"
PLOT = Path(__file__).parents[3] / "docs" / "images" / "fp8_digits.svg"
FORMATS = {"none": None, "e4m3": FP8Spec(dtype="e4m3"), "e5m2": FP8Spec(dtype="e5m2")}


def run(data: tuple, teacher: torch.nn.Module, spec: FP8Spec | None, *, epochs: int = 12) -> dict:
    """Train the projections under the noise of one format; attention errors before and after, and what converts."""
    images, labels = data
    train, held = (images[HELD_OUT:], labels[HELD_OUT:]), (images[:HELD_OUT], labels[:HELD_OUT])
    student = student_of(teacher)
    if spec is not None:
        prepare_qat_(student, FP8QATConfig(weight=spec, activation=spec, skip=()))
    names = freeze_except_(student, ["proj_lin"])
    parameters = dict(student.named_parameters())
    before = {name: p.clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW([parameters[n] for n in names], lr=5e-3)
    distiller = Distiller(student, teacher, lambda name, module: isinstance(module, Attention))

    def held_out_error() -> float:
        with torch.no_grad():
            teacher(held[0])
            student(held[0])
            return distiller.loss().item()

    first, steps = held_out_error(), 0
    accuracy_before = accuracy(student, *held)
    for epoch in range(epochs):
        for x, _ in batches(*train, 100 + epoch):
            with torch.no_grad():
                teacher(x)
            student(x)
            optimizer.zero_grad()
            distiller.loss().backward()
            optimizer.step()
            steps += 1
    last = held_out_error()
    rounded_afterwards = {}
    if spec is None:  # what training without the noise is worth under it
        for name in ("e4m3", "e5m2"):
            with prepare_qat_(student, FP8QATConfig(weight=FORMATS[name], activation=FORMATS[name], skip=())):
                rounded_afterwards[f"after_then_{name}"] = held_out_error()
    distiller.remove()
    result = {
        "before": first,
        "after": last,
        **rounded_afterwards,
        "accuracy_before": accuracy_before,
        "accuracy_after": accuracy(student, *held),
        "steps": steps,
        "trained": sum(parameters[n].numel() for n in names),
        "parameters": sum(p.numel() for p in student.parameters()),
        "only_listed_changed": all(torch.equal(p, before[n]) for n, p in parameters.items() if n not in names),
    }
    if spec is not None:
        with torch.no_grad():
            prepared = student(held[0])
            convert_qat_(student, "fp8_dynamic")
            stored = student(held[0])
        result["converted_difference"] = ((stored - prepared).norm() / prepared.norm()).item()
        result["accuracy_converted"] = accuracy(student, *held)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Attention errors before and after training under FP8 noise.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot", action="store_true", help="draw the committed record and do nothing else")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(RESULTS.read_text()))
        return
    torch.set_num_threads(1)
    data = load_digits_images()
    runs = []
    for seed in range(options.seeds):
        teacher = train_teacher(data[0][HELD_OUT:], data[1][HELD_OUT:], epochs=15, seed=seed)
        dense = accuracy(teacher, data[0][:HELD_OUT], data[1][:HELD_OUT])
        for name, spec in FORMATS.items():
            runs.append({"seed": seed, "format": name, "teacher_accuracy": dense, **run(data, teacher, spec)})
            print(json.dumps(runs[-1]), flush=True)
    meta = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "machine": device_name(),
        "threads": 1,
    }
    RESULTS.write_text(json.dumps({"meta": meta, "runs": runs}, indent=1) + "\n")


def plot(record: dict) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "eff"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3))
    for place, name in enumerate(FORMATS):
        for r in (r for r in record["runs"] if r["format"] == name):
            x = place + 0.12 * (r["seed"] - 1)
            axes.plot([x, x], [r["before"], r["after"]], color="#999999", zorder=1)
            axes.scatter([x], [r["before"]], color="#c44e52", zorder=2)
            axes.scatter([x], [r["after"]], color="#4c72b0", zorder=2)
    axes.set_xticks(range(len(FORMATS)), ["no FP8", "E4M3", "E5M2"])
    axes.set_ylim(0)
    axes.set_ylabel("squared error of attention outputs")
    axes.set_title("held-out digits: before (red) and after (blue) 168 steps", fontsize=9)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    main()

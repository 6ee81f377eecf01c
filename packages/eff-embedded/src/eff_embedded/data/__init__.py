"""Data and small models that lie in packages of the registry: one function each, no download of its own.

Each function names its extra of eff-embedded in the error that it raises when the package is missing. Packages are
found without importing them, so that what they depend on is not needed. `LICENCES` holds the terms of the content.
"""

from eff_embedded.data.code import CodeTask, human_eval
from eff_embedded.data.handwriting import Digits, digits
from eff_embedded.data.hyperspectral import INDIAN_PINES_CLASSES, HyperspectralScene, indian_pines
from eff_embedded.data.neural import BrainSeries, SpikeTrain, fmri_regions, grasshopper_neuron
from eff_embedded.data.photographs import PHOTOGRAPHS, StereoPair, motorcycle_stereo, photograph
from eff_embedded.data.posed import PosedPhotographs, balbianello
from eff_embedded.data.sentences import SentenceEncoder, minilm
from eff_embedded.data.speech import SpeechModel, whisper_tiny
from eff_embedded.data.vision_models import ImageClassifier, efficientnet_lite0, xfeat

LICENCES: dict[str, str] = {
    "balbianello": "BSD-3-Clause, with gtsam",
    "digits": "CC BY 4.0, UCI: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, doi:10.24432/C50P49",
    "efficientnet_lite0": "Apache-2.0, ML Illustrated; architecture and training by Google (Apache-2.0)",
    "fmri_regions": "BSD-3-Clause, with nitime",
    "grasshopper_neuron": "BSD-3-Clause, with nitime",
    "human_eval": "MIT, OpenAI",
    "indian_pines": "CC BY 3.0, Baumgardner, Biehl and Landgrebe 2015, doi:10.4231/R7RX991C",
    "minilm": "Apache-2.0, sentence-transformers/all-MiniLM-L6-v2",
    "motorcycle_stereo": "Middlebury 2014 stereo data (Scharstein et al., GCPR 2014), as scikit-image passes it on",
    "photograph": "CC0 or public domain, each as scikit-image's documentation of skimage.data says",
    "whisper_tiny": "MIT, OpenAI",
    "xfeat": "Apache-2.0, VeRLab UFMG",
}
"""Terms of the content that each function returns."""

__all__ = [
    "INDIAN_PINES_CLASSES",
    "LICENCES",
    "PHOTOGRAPHS",
    "BrainSeries",
    "CodeTask",
    "Digits",
    "HyperspectralScene",
    "ImageClassifier",
    "PosedPhotographs",
    "SentenceEncoder",
    "SpeechModel",
    "SpikeTrain",
    "StereoPair",
    "balbianello",
    "digits",
    "efficientnet_lite0",
    "fmri_regions",
    "grasshopper_neuron",
    "human_eval",
    "indian_pines",
    "minilm",
    "motorcycle_stereo",
    "photograph",
    "whisper_tiny",
    "xfeat",
]

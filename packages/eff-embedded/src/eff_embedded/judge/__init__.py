"""A judge of collages: finds the objects of collage diffusion on a picture and says where they lie.

It was trained on drawn collages alone, apart from every model that it judges.

>>> judge = load_judge()
>>> judge(pipe("a dog left of an apple", seed=0).images[0])[0].place("dog", "apple")
'left of'
"""

from eff_embedded.judge.judge import JUDGE, Judge, load_judge, tensor_of
from eff_embedded.judge.network import CELL, JudgeNetwork, Scores
from eff_embedded.judge.reading import Find, Reading, box_of

__all__ = ["CELL", "JUDGE", "Find", "Judge", "JudgeNetwork", "Reading", "Scores", "box_of", "load_judge", "tensor_of"]

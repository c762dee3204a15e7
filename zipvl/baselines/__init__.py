"""The methods that ZipVL is compared with, each from its paper, and variants of ZipVL itself.

Each is a context manager over a transformers model.
"""

from zipvl.baselines.aim import AIM, aim
from zipvl.baselines.common import Baseline, Record, applied, image_budget
from zipvl.baselines.fastv import FastV, fastv
from zipvl.baselines.pyramiddrop import PyramidDrop, pyramiddrop
from zipvl.baselines.variant import Variant, variant
from zipvl.baselines.visionzip import TowerAttention, VisionZip, observed_tower, visionzip

__all__ = [
    "AIM",
    "Baseline",
    "FastV",
    "PyramidDrop",
    "Record",
    "TowerAttention",
    "Variant",
    "VisionZip",
    "aim",
    "applied",
    "fastv",
    "image_budget",
    "observed_tower",
    "pyramiddrop",
    "variant",
    "visionzip",
]

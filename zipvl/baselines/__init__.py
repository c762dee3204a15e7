"""The methods that ZipVL is compared with, each from its paper, as context managers over a transformers model."""

from zipvl.baselines.aim import AIM, aim
from zipvl.baselines.common import Record, Rival, applied, image_budget
from zipvl.baselines.fastv import FastV, fastv
from zipvl.baselines.pyramiddrop import PyramidDrop, pyramiddrop
from zipvl.baselines.visionzip import TowerAttention, VisionZip, observed_tower, visionzip

__all__ = [
    "AIM",
    "FastV",
    "PyramidDrop",
    "Record",
    "Rival",
    "TowerAttention",
    "VisionZip",
    "aim",
    "applied",
    "fastv",
    "image_budget",
    "observed_tower",
    "pyramiddrop",
    "visionzip",
]

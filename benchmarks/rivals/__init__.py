"""The methods that ZipVL is compared with, each from its paper, as context managers over a transformers model."""

from benchmarks.rivals._common import Record, Rival, applied, image_budget
from benchmarks.rivals.aim import AIM, aim
from benchmarks.rivals.fastv import FastV, fastv
from benchmarks.rivals.pyramiddrop import PyramidDrop, pyramiddrop
from benchmarks.rivals.visionzip import TowerAttention, VisionZip, observed_tower, visionzip

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

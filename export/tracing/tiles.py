"""What families share whose pictures become square tiles: each tile goes through the tower, and the host says which of
all tiles' features, and of a few learned ones behind them, become the picture's tokens.

Graph (T tiles and M visual tokens of all pictures of a step, P features of a tile, D hidden width)

    vision   pixel_values [T, 3, H, W], feature_index [M] -> image_features [M, D]

``feature_index`` (int64) counts the features of all tiles in order, and goes on with the learned ones at T P.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vlmtrim.export.job import Refusal
from vlmtrim.export.tracing.text_decoder import Shape
from vlmtrim.export.tracing.trace import Plan
from vlmtrim.export.tracing.vision_tower import tile_tokens
from vlmtrim.graphs.contract import GraphSpec, TensorSpec


@dataclass(frozen=True, kw_only=True)
class TiledShape(Shape):
    """Shape and what tiles add: features of a tile, and tiles of one picture at most, the squeezed one included."""

    tile_tokens: int
    most_tiles: int


class TiledVision(nn.Module, ABC):
    """Tower, projector, learned features and the order of all three."""

    def __init__(self, full: Any):
        super().__init__()
        self.full = full

    @abstractmethod
    def table(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [T, 3, H, W] -> what feature_index chooses from, [T P and the learned ones, D]."""

    def forward(self, pixel_values: Tensor, feature_index: Tensor) -> Tensor:
        """pixel_values [T, 3, H, W], feature_index [M] into the table -> image features [M, D]."""
        return self.table(pixel_values).index_select(0, feature_index)


def vision_spec(shape: TiledShape, dtype: str) -> GraphSpec:
    """Boundary of ``vision.onnx``."""
    return GraphSpec(
        "vision.onnx",
        (
            TensorSpec("pixel_values", dtype, ("T", 3, shape.image_size, shape.image_size)),
            TensorSpec("feature_index", "int64", ("M",)),
        ),
        (TensorSpec("image_features", dtype, ("M", shape.hidden)),),
    )


def vision_dims(shape: TiledShape, images: int) -> dict[str, tuple[int, int]]:
    """Sizes of the vision graph's symbolic dimensions when a step brings 1 to ``images`` pictures of full size.

    Twice as many fit where none fills its tiles: without padding about half of the tokens remain.
    """
    return {"T": (2, 2 * images * shape.most_tiles), "M": (shape.tile_tokens, 2 * images * shape.image_tokens)}


def vision_plan(module: TiledVision, shape: TiledShape, dtype: torch.dtype) -> Plan:
    """How to trace ``vision.onnx``."""
    pixels = torch.zeros(3, 3, shape.image_size, shape.image_size, dtype=dtype)
    index = torch.zeros(7, dtype=torch.int64)
    spec = vision_spec(shape, str(dtype).removeprefix("torch."))
    return Plan(module, (pixels, index), ({0: Dim("T", max=4096)}, {0: Dim("M", max=2**20)}), spec)


def tile_grids(config: Any) -> tuple[int, list[tuple[int, int]]]:
    """Patches along the side of a tile, and rows and columns of tiles of every resolution. Raises Refusal."""
    vision: Any = config.vision_config
    tokens, side = tile_tokens(config), vision.image_size // vision.patch_size
    if tokens != side * side:
        raise Refusal(
            f"the {vision.model_type} tower with vision_feature_select_strategy "
            f"{config.vision_feature_select_strategy!r} makes {tokens} features of {side} x {side} patches, which "
            f"{config.model_type} cannot lay on a grid; 'default' suits a tower with a class token, 'full' one without"
        )
    grids = [tile_grid(resolution, vision.image_size) for resolution in config.image_grid_pinpoints or []]
    if not grids:
        raise Refusal("image_grid_pinpoints is empty; give the resolutions that a picture may be scaled to")
    return side, grids


def tile_grid(resolution: Any, size: int) -> tuple[int, int]:
    """Rows and columns of tiles of ``size`` pixels that cover a (height, width). Raises Refusal."""
    height, width = resolution
    if height % size or width % size or not height * width:
        raise Refusal(f"image_grid_pinpoints holds {height} x {width}, no multiple of the tower's {size} pixels")
    return height // size, width // size

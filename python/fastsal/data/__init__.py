"""Labeled images: files, data sets, batches, corruptions and held-out samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastsal.data.batches import Batches
    from fastsal.data.folders import load_images
    from fastsal.data.image_set import ImageBatches, ImageSet
    from fastsal.data.opening import open_images

__all__ = ["Batches", "ImageBatches", "ImageSet", "load_images", "open_images"]

__getattr__ = lazy_names(
    __name__,
    {
        "Batches": "batches",
        "ImageBatches": "image_set",
        "ImageSet": "image_set",
        "load_images": "folders",
        "open_images": "opening",
    },
)

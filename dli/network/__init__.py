"""Networks and losses."""
from .._door import door

__all__, __getattr__, __dir__ = door(__name__, {
    "weights": "image_weights pixel_weights",
    "losses": "LOSSES BinaryCrossEntropy Dice FocalOfMeans Lovasz SegmentationLoss WeightedBCE make_loss",
    "models": "ENCODERS Encoder WeightsUnavailable lightweight_unet",
})

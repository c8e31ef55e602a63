"""Networks and losses."""
from .._door import door

__all__, __getattr__, __dir__ = door(__name__, {
    "weights": "image_weights pixel_weights",
    "losses": "LOSSES Dice FocalOfMeans Loss Lovasz SegmentationLoss WeightedBCE make_loss",
    "models": "ENCODERS Encoder WeightsUnavailable lightweight_unet load_weights save_weights",
    "speed": "faster",
    "modelfile": "ModelNotes build_model find_models read_notes save_model",
})

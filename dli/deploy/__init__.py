"""Use a trained model: predict photographs, choose thresholds, judge, export."""
from .._door import door

__all__, __getattr__, __dir__ = door(__name__, {
    "predictor": "Predictions Predictor load",
    "thresholds": "Thresholds choose_thresholds",
    "judging": "Evaluation judge",
    "prediction": "predict_files",
    "export": "ExportReport export_onnx",
})

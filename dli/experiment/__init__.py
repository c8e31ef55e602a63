"""Runs: configs, training, stored rows."""
from .._door import door

__all__, __getattr__, __dir__ = door(__name__, {
    "datasets": "DATASETS Dataset find_dataset load_dataset",
    "config": "METHODS PRESETS Method Preset RunConfig notebook_config resolve run_key run_name",
    "store": "RESULTS load_runs publish run_folder runs_in",
    "loader": "batches run_injection run_samples",
    "evaluation": "evaluate plot_predictions predict predict_samples",
    "state": "fit",
    "preview": "preview_page",
    "report": "logger write_report",
    "training": "load_model run",
})

"""Photographs, masks and tables: a `Samples`, where it comes from and how it is split."""
from .._door import door

__all__, __getattr__, __dir__ = door(__name__, {
    "samples": "FREE Samples dataset_table show_samples",
    "masks": "one_hot",
    "splits": "possible_folds split_samples",
    "magnetic": "MT_CLASSES DamagedDataset DownloadError fetch_magnetic_tiles find_magnetic_tiles magnetic_tiles "
                "verify_magnetic_tiles",
    "synthetic": "synthetic_tiles",
    "folders": "LAYOUTS DataFile read_data_file read_folder",
    "check": "FolderCheck check_folder",
    "guess": "Guess guess_data_file",
})

"""The loaders that are compared, a file each; add one: its file, and its name here.

loaders.py --task--> process of NAME.py (loader.py: serve) --figures--> loaders.py
"""

OURS = "latentmill"
CEILING = "ceiling"
# name of the file -> name in the table
RIVALS = {
    "stock_webdataset": "webdataset",
    "lightning_litdata": "LitData",
    "mosaicml_streaming": "MosaicML streaming",
    "huggingface_datasets": "HF datasets, streaming",
    "torch_files": "torch DataLoader, files",
}
LABELS = {OURS: "latentmill", **RIVALS}

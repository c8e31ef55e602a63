"""Package metadata, read from `settings.ini` (one place for names, versions and requirements)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def requirements(*names: str) -> list[str]:
    "The requirements of some lists of settings.ini, each once."
    return list(dict.fromkeys(line for name in names for line in cfg[f"{name}_requirements"].split()))


setup(
    name=cfg["dist_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    # so an editable install becomes a plain path, which is found before a clone called dli in the current folder
    package_dir={"": "."},
    packages=find_packages(include=["dli", "dli.*"]),
    package_data={"dli": ["**/*.csv"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={
        "train": requirements("train"),
        "study": requirements("train", "study"),
        "ray": requirements("train", "ray"),
        "coco": requirements("coco"),
        "onnx": requirements("train", "onnx"),
        "loops": requirements("train", "loops"),
        "docs": requirements("docs"),
        "site": requirements("docs", "site"),
        "dev": requirements("train", "study", "coco", "onnx", "docs", "dev"),
    },
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)

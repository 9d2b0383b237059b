"""The packages: the folders `components` and `pipelines` are installed as `skd_kfp.components` and `skd_kfp.pipelines`.

At the top of site-packages these names would collide with other folders `pipelines`. All else is in pyproject.toml.
"""

from setuptools import find_namespace_packages, find_packages, setup

FOLDERS = ("components", "pipelines")
FOUND = find_namespace_packages(include=[f"{folder}*" for folder in FOLDERS], exclude=["*.__pycache__"])

setup(
    packages=[*find_packages(include=["skd_lib", "skd_lib.*"]), *(f"skd_kfp.{name}" for name in FOUND)],
    package_dir={"skd_lib": "skd_lib", **{f"skd_kfp.{folder}": folder for folder in FOLDERS}},
    package_data={"": ["README.md", "*.yaml", "templates/*", "*.txt", "py.typed"]},
)

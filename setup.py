from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf8")
cfg = cfg["DEFAULT"]
extras = {name: cfg[f"{name}_requirements"].split() for name in ("dev", "docs", "onnx")}
extras["dev"] += extras["docs"] + extras["onnx"]                       # the tests build the site and the ONNX file

setuptools.setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
    license="Apache-2.0", license_files=["LICENSE"],
    long_description=(here / "README.md").read_text(encoding="utf8"), long_description_content_type="text/markdown",
    packages=setuptools.find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    include_package_data=True, zip_safe=False, python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(), extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
)

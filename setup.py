import re
from configparser import ConfigParser
from pathlib import Path

import setuptools

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf8")
cfg = cfg["DEFAULT"]
names = ("dev", "docs", "onnx", "timm", "pretrained", "ray")
extras = {name: cfg[f"{name}_requirements"].split() for name in names}
# the tests build the site and the ONNX file, train a pretrained backbone, and start a cluster
extras["dev"] += extras["docs"] + extras["onnx"] + extras["pretrained"] + extras["ray"]

readme = (here / "README.md").read_text(encoding="utf8")
blob = (
    f"{cfg['git_url']}/raw/{cfg['branch']}/"  # links of the README, for those who read it elsewhere
)

setuptools.setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    long_description=re.sub(r"\]\((?![a-z]+:|#)", f"]({blob}", readme),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    keywords=cfg["keywords"].split(),
    packages=setuptools.find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    include_package_data=True,
    zip_safe=False,
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)

"""The door to all sources: `open_source` lists one by the words that a user writes.

Everything is listed before anything is converted, in an order that depends on names only or that
the source itself has, and no image is decoded. Nothing here executes what a file contains, and no
member of an archive is ever unpacked.
"""

import os
from difflib import get_close_matches

from backmix.pipeline.sources.cifar import open_cifar
from backmix.pipeline.sources.folder import open_folder
from backmix.pipeline.sources.imagenet import open_imagenet
from backmix.pipeline.sources.lists import open_list
from backmix.pipeline.sources.parquet import open_parquet
from backmix.pipeline.sources.source import Source
from backmix.pipeline.sources.svhn import open_svhn
from backmix.pipeline.sources.tar import open_tar
from backmix.pipeline.sources.tinyimagenet import open_tinyimagenet
from backmix.pipeline.sources.webdataset import open_webdataset

SCHEMES = """folder:DIR             class folders of images
tar:FILE//PREFIX       class folders inside a plain tar
list:FILE//ROOT        a text file with a line per image: path below ROOT, space or tab, label
imagenet:DIR           ImageNet-1k: tars or folders, devkit or Kaggle; imagenet:DIR//val
cifar:DIR              CIFAR-10 or CIFAR-100, python or binary batches; cifar:DIR//test
svhn:DIR               SVHN, train_32x32.mat; svhn:DIR//test, svhn:DIR//extra
tinyimagenet:DIR       Tiny-ImageNet-200 as published; tinyimagenet:DIR//val
webdataset:SHARDS      tars of KEY.jpg and KEY.cls or KEY.json, such as 'data-{000..099}.tar'
parquet:FILES//LABEL   Hugging Face image parquet, such as 'train-*.parquet'; LABEL is a column"""
"""The sources there are, one a line, for help and messages."""


def open_source(spec: str, classes: list[str] | None = None) -> Source:
    """List a source.

    Args:
        spec: one of `SCHEMES`.
        classes: the class list in label order; None takes the classes that are there. Listed
            classes may have no images; a class with images that is not listed is an error. Where
            a source knows numbers only, the list gives them names.

    Raises:
        ValueError: an unknown spec, a wrong layout or damaged file, no images, or a class list
            that does not fit; the message says where and what to do.
        OSError: something cannot be read.
    """
    scheme, colon, rest = spec.partition(":")
    openers = {
        "folder": open_folder,
        "tar": open_tar,
        "list": open_list,
        "imagenet": open_imagenet,
        "cifar": open_cifar,
        "svhn": open_svhn,
        "tinyimagenet": open_tinyimagenet,
        "webdataset": open_webdataset,
        "parquet": open_parquet,
    }
    if not colon or scheme not in openers or not rest:
        near = get_close_matches(scheme.lower(), openers, n=1)
        if os.path.isdir(spec):
            hint = f"; did you mean folder:{spec} ?"
        elif near:
            hint = f"; did you mean {near[0]}:{rest or '...'} ?"
        else:
            hint = "."
        raise ValueError(f"unknown source {spec!r}{hint} Sources are:\n{SCHEMES}")
    return openers[scheme](spec, rest, classes)

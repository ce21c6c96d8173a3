"""Decide about images with an exported file and ONNX Runtime alone: onnx_alone.py MODEL IMAGE..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
about = json.loads(session.get_modelmeta().custom_metadata_map["backmix"])
classes, seen = about["record"]["classes"], about["record"]["preprocessing"]
assert seen["crop"] == "whole"  # else about["views"]["box"] says what to cut first
for file in sys.argv[2:]:
    image = Image.open(file).convert("RGB").resize((seen["size"],) * 2, Image.Resampling.BILINEAR)
    said = session.run(["class_index", "p_value", "accept"], {"images": np.asarray(image)[None]})
    class_index, p_value, accept = (values[0] for values in said)
    print(f"{file} {classes[class_index]} {p_value:.4f} {accept}")

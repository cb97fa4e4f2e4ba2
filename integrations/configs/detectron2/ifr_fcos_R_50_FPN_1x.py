from detectron2.model_zoo import get_config

from ifr_fast.integrations.detectron2 import IFRFCOSHead

_zoo = get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
_zoo.model.head._target_ = IFRFCOSHead
globals().update(_zoo)

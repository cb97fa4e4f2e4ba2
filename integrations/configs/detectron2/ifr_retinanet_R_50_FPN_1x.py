from detectron2.model_zoo import get_config

from ifr_fast.integrations.detectron2 import IFRRetinaNetHead

_zoo = get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
_zoo.model.head._target_ = IFRRetinaNetHead
globals().update(_zoo)

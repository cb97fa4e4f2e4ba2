from detectron2.model_zoo import get_config

from ifr_fast.integrations.detectron2 import IFRMaskRCNNConvUpsampleHead

_zoo = get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
_zoo.model.roi_heads.mask_head._target_ = IFRMaskRCNNConvUpsampleHead
globals().update(_zoo)

from detectron2.model_zoo import get_config

from ifr_fast.integrations.detectron2 import IFRKRCNNConvDeconvUpsampleHead

_zoo = get_config("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.py")
_zoo.model.roi_heads.keypoint_head._target_ = IFRKRCNNConvDeconvUpsampleHead
globals().update(_zoo)

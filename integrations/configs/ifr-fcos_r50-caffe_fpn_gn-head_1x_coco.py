_base_ = ["mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", "./_ifr.py"]

model = dict(bbox_head=dict(type="IFRFCOSHead"))

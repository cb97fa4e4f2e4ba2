_base_ = ["mmdet::ms_rcnn/ms-rcnn_r50_fpn_1x_coco.py", "./_ifr.py"]

model = dict(roi_head=dict(mask_head=dict(type="IFRFCNMaskHead")))

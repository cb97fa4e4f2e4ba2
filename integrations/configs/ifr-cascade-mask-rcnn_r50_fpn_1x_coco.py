_base_ = ["mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py", "./_ifr.py"]

# One mask head for each of the three stages.
model = dict(roi_head=dict(mask_head=dict(type="IFRFCNMaskHead")))

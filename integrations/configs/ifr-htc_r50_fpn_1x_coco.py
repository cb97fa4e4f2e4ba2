_base_ = ["mmdet::htc/htc_r50_fpn_1x_coco.py", "./_ifr.py"]

mask_heads = [dict(head, type="IFRHTCMaskHead") for head in _base_.model.roi_head.mask_head]
model = dict(roi_head=dict(mask_head=mask_heads))

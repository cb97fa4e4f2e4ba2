_base_ = ["mmdet::boxinst/boxinst_r50_fpn_ms-90k_coco.py", "./_ifr.py"]

model = dict(mask_head=dict(type="IFRBoxInstMaskHead"))

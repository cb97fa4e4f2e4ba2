_base_ = ["mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py", "./_ifr.py"]

model = dict(mask_head=dict(type="IFRCondInstMaskHead"))

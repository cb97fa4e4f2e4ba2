_base_ = ["mmdet::solo/solo_r50_fpn_1x_coco.py", "./_ifr.py"]

model = dict(mask_head=dict(type="IFRSOLOHead"))

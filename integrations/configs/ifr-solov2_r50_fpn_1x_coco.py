_base_ = ["mmdet::solov2/solov2_r50_fpn_1x_coco.py", "./_ifr.py"]

model = dict(mask_head=dict(type="IFRSOLOV2Head"))

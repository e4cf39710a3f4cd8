"""Pure graph code: passes over the joint graph and the backward graph. Nothing here sees a real tensor."""

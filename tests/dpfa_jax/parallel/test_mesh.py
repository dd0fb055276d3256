"""How arrays lie on meshes that have both axes, one of them, or neither."""

import jax
import pytest
from jax.sharding import PartitionSpec

from dpfa_jax.parallel.mesh import fsdp_shardings, make_mesh, parameter_shardings

TREE = {"w": jax.ShapeDtypeStruct((4, 6), "float32"), "b": jax.ShapeDtypeStruct((6,), "float32")}


def a_mesh(*names):
    return make_mesh(dict.fromkeys(names, 1), jax.devices()[:1])


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_mesh_without_a_model_axis_has_one_of_size_one(fsdp):
    found = parameter_shardings(TREE, a_mesh("data"), fsdp=fsdp)
    both = parameter_shardings(TREE, a_mesh("data", "model"), fsdp=fsdp)
    assert {name: x.spec for name, x in found.items()} == {name: x.spec for name, x in both.items()}


def test_without_a_model_axis_parameters_are_split_over_data():
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    specs = {name: x.spec for name, x in parameter_shardings(TREE, mesh, fsdp=True).items()}
    assert specs == {"w": PartitionSpec("data"), "b": PartitionSpec("data")}


@pytest.mark.parametrize("place", [fsdp_shardings, parameter_shardings])
@pytest.mark.parametrize("names", [("model",), ("x", "y")])
def test_a_mesh_without_a_data_axis_is_refused(place, names):
    with pytest.raises(ValueError, match=r"mesh has the axes \(.*\): one named 'data' is needed"):
        place(TREE, a_mesh(*names))
    with pytest.raises(ValueError, match=repr(names[0])):
        place(TREE, a_mesh(*names))


def test_another_name_of_the_data_axis():
    fsdp_shardings(TREE, a_mesh("x"), "x")
    with pytest.raises(ValueError, match="one named 'z' is needed"):
        fsdp_shardings(TREE, a_mesh("x"), "z")

// Fills structs made by IFR_STRUCT from a Python dictionary: a value for each field, an address for a pointer.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace ifr {

namespace py = pybind11;

// The names of a struct's fields as Python strings, made once: a look-up then compares addresses.
template <typename Struct>
const std::vector<PyObject *> &names() {
  static const std::vector<PyObject *> all = [] {
    std::vector<PyObject *> found;
    Struct{}.each_field([&](const char *name, auto &) { found.push_back(PyUnicode_InternFromString(name)); });
    return found;
  }();
  return all;
}

template <typename Struct>
void fill(const py::dict &given, Struct &out) {
  auto next = names<Struct>().begin();
  out.each_field([&](const char *name, auto &field) {
    using Field = std::remove_reference_t<decltype(field)>;
    const py::handle value = PyDict_GetItemWithError(given.ptr(), *next++);
    if (!value) throw py::type_error(std::string("missing field '") + name + "'");
    try {
      if constexpr (std::is_pointer_v<Field>)
        field = reinterpret_cast<Field>(value.cast<uintptr_t>());
      else if (std::is_same_v<Field, bool> && !PyBool_Check(value.ptr()))
        throw py::cast_error();
      else
        field = value.cast<Field>();
    } catch (const py::cast_error &) {
      throw py::type_error(std::string("field '") + name + "' cannot be " + std::string(py::str(value)));
    }
  });
}

// Structs from what is given. TypeError names one that is missing, of the wrong type, or no struct's field.
template <typename... Structs>
std::tuple<Structs...> read(const py::dict &given) {
  std::tuple<Structs...> out{};
  (fill(given, std::get<Structs>(out)), ...);
  if (given.size() == (names<Structs>().size() + ...)) return out;
  const auto unknown = py::reinterpret_steal<py::dict>(PyDict_Copy(given.ptr()));
  const auto drop = [&](const std::vector<PyObject *> &known) {
    for (PyObject *name : known) PyDict_DelItem(unknown.ptr(), name);
  };
  (drop(names<Structs>()), ...);
  throw py::type_error("unknown field '" + std::string(py::str(unknown.begin()->first)) + "'");
}

}  // namespace ifr

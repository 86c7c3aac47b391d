// Before protobuf's own header in the preset `tsan`. Under ThreadSanitizer MapFieldBase has two members more, in
// front of the others; Debian's libprotobuf was built without them and would read its fields eight bytes off.
#include <cstddef>  // libstdc++ asks the same macro when its first header is read, and must see it

#pragma push_macro("__SANITIZE_THREAD__")
#undef __SANITIZE_THREAD__
#include_next <google/protobuf/map_field.h>
#pragma pop_macro("__SANITIZE_THREAD__")

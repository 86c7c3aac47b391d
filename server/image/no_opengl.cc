// OpenCV's core can share memory with OpenGL. cv::resize never does, but the archive refers to these functions of
// libGLX all the same, and libGLX loads seven libraries of X11. These say that there is no OpenGL.

extern "C" {

void* glXGetCurrentContext() { return nullptr; }
void* glXGetCurrentDisplay() { return nullptr; }
void (*glXGetProcAddressARB(const unsigned char* name))() { return nullptr; }

}  // extern "C"
